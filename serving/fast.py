"""The operations of a decoder layer as dense products of the library and a few fused kernels, on a GPU.

Behind a row's outputs lie its products with the first factors of its adapter. When decoding, the factors of narrow
adapters are rows behind the base's weights, so that one dense product computes both; over prompts a grouped kernel
writes these products there (`grouped.py`). The kernel that reads the outputs next adds the second product: it has no
launch of its own. Wide adapters' updates are added by grouped kernels alone.
Shapes: T rows, I inputs, O outputs, N outputs and what lies behind, S sections, R products of a section, D width.
"""

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from serving.adapter import Place
from serving.base import FIRST_NORM, LAST_NORM, FrozenBase
from serving.cache import Cache
from serving.group import Group
from serving.grouped import Grouped
from serving.grouping import FEW, MANY, ONE, SOME
from serving.kernel.gate import gate_kernel, scale_kernel
from serving.kernel.norm import norm_kernel
from serving.paged import PagedAttention
from serving.passing import Pass
from serving.plain import Plain, Stream
from serving.pool import Pool
from serving.rotary import RotaryHeads

# Measured on an H200, by the rows of a tile.
GATE_TILE = {ONE: 1024, FEW: 128, SOME: 128, MANY: 64}  # outputs of a gate's tile
GATE_WARPS = {ONE: 4, FEW: 4, SOME: 8, MANY: 4}
NORM_WARPS = {True: 16, False: 4}  # by whether there is a tail behind the outputs
SCALE_TILE = 1024


class Fast(Plain):
    """The operations of a decoder layer."""

    def __init__(self, base: FrozenBase, pool: Pool, cache: Cache) -> None:
        super().__init__(base, pool, cache)
        self.pool = pool
        self.paged = PagedAttention(base.shape, cache)
        self.rotary = RotaryHeads(base, pool, cache)
        self.grouped = Grouped(base, pool)
        self.arena = pool.arena.data
        self.stride = pool.adapter_stride
        self.has_varlen = base.dtype != torch.float32

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs [T, N] of a group, and behind them the products that complete them."""
        group = self.base.groups[name]
        if step.needs.scales and name == "o":
            self._scale(step, layer, x_TI)
        if step.is_decoding:
            y_TN = self._decoded(step, group, layer, x_TI)
        elif step.has_products:
            y_TN = self._with_products(step, group, layer, x_TI)
        else:
            y_TN = self._prompted(step, group, layer, x_TI)
        if group.is_residual:
            self.grouped.add_bottlenecks(step.grouping, group, layer, y_TN)
        return y_TN

    def first_norm(self, step: Pass, x_TD: Tensor) -> Stream:
        """The residual stream that embeddings begin, with the norm of the first layer."""
        anywhere = self.pool.entry(0, LAST_NORM)  # no linear layer's entry, of which nothing is read
        first = (0, FIRST_NORM)
        return self._normed(step, first, x_TD, None, anywhere)

    def norm(self, step: Pass, place: Place, x_TD: Tensor, stream_TD: Tensor, source: Place) -> Stream:
        """The residual stream with x, which is completed, and the stream's norm."""
        layer, name = source
        linear = f"{name}_proj"
        origin = self.pool.entry(layer, linear)
        return self._normed(step, place, x_TD, stream_TD, origin)

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries; keys and values go to the cache."""
        rotary = self.rotary
        return rotary.rotate(step, layer, y_TO)

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention: over pages where every row is a sequence, else of runs of rows."""
        if step.is_decoding:
            return self.paged.attend_rows(step, layer, query_THE)
        if self.has_varlen:
            return self.paged.attend_runs(step, layer, query_THE)
        return super().attend(step, layer, query_THE)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """What the down projection gets, with what its adapter scales it by."""
        needs = step.needs
        tiles = step.tiles
        group = self.base.groups["gate_up"]
        inner = self.shape.mlp
        result_TI = y_TO.new_empty(len(y_TO), inner)
        tile = GATE_TILE[tiles.rows]
        grid = (triton.cdiv(inner, tile), tiles.count)
        gate_kernel[grid](
            y_TO,
            result_TI,
            tiles.adapter_G,
            tiles.row_GF,
            self.pool.entry(layer, group.first_linear),
            self.pool.entry(layer, "down_proj"),
            self.arena,
            inner,
            y_TO.stride(0),
            self.stride,
            T=tiles.rows,
            N=tile,
            R=step.products,
            SECTIONS=group.sections,
            GELU=self.shape.gelu,
            TAIL=step.has_products,
            PLACED=step.is_decoding,
            GAIN=needs.gains,
            SCALE=needs.scales,
            num_warps=GATE_WARPS[tiles.rows],
        )
        return result_TI

    def _decoded(self, step: Pass, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs when decoding, and behind them the products of all rows with the narrow adapters' A."""
        grouping = step.grouping
        tail = group.sections * step.tail
        rows = group.outputs + tail
        weight_NI = group.weight(layer, rows)
        bias_N = group.bias(layer, rows)
        shares_HTO = self.grouped.begin(grouping, group, layer, x_TI)
        y_TN = linear(x_TI, weight_NI, bias_N)
        self.grouped.finish(grouping, shares_HTO, y_TN)
        return y_TN

    def _prompted(self, step: Pass, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs over prompts, complete."""
        outputs = group.outputs
        weight_OI = group.weight(layer, outputs)
        bias_O = group.bias(layer, outputs)
        y_TO = linear(x_TI, weight_OI, bias_O)
        self.grouped.add(step.grouping, group, layer, x_TI, y_TO)
        return y_TO

    def _with_products(self, step: Pass, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs over prompts, and behind them each row's products with its own A.

        They are complete where they go to the residual stream, as a norm has no tiles of rows.
        """
        grouping = step.grouping
        outputs = group.outputs
        sections = group.sections
        weight_OI = group.weight(layer, outputs)
        bias_O = group.bias(layer, outputs)
        numbers = outputs + sections * step.products
        rows = len(x_TI)
        y_TN = x_TI.new_empty(rows, numbers)
        y_TO = y_TN[:, :outputs]
        weight_IO = weight_OI.T
        if bias_O is None:
            torch.mm(x_TI, weight_IO, out=y_TO)
        else:
            torch.addmm(bias_O, x_TI, weight_IO, out=y_TO)
        h_TR = y_TN[:, outputs:]
        h_TSR = h_TR.unflatten(1, (sections, step.products))
        self.grouped.shrink(grouping, group, layer, x_TI, h_TSR)
        if group.is_residual:
            self.grouped.expand(grouping, group, layer, h_TSR, y_TN)
        return y_TN

    def _normed(self, step: Pass, place: Place, x_TD: Tensor, residual_TD: Tensor | None, origin: Tensor) -> Stream:
        """The sum of x and the residual stream, and its norm; x comes from the linear layer of an entry."""
        layer, name = place
        needs = step.needs
        width = self.shape.width
        stream_TD = x_TD.new_empty(len(x_TD), width)
        normed_TD = torch.empty_like(stream_TD)
        weight_LD = self.base.norms[name]
        adds = residual_TD is not None  # otherwise x are embeddings, which no linear layer's adapter changes
        has_tail = step.tail > 0
        grid = (len(x_TD),)
        norm_kernel[grid](
            x_TD,
            residual_TD,
            stream_TD,
            normed_TD,
            weight_LD[layer],
            step.adapters.adapter_T,
            origin,
            self.pool.entry(layer, name),
            self.arena,
            width,
            x_TD.stride(0),
            self.stride,
            self.shape.epsilon,
            D=triton.next_power_of_2(width),
            R=step.products,
            ADD=adds,
            TAIL=adds and has_tail,
            GAIN=adds and needs.gains,
            OWN=needs.norms,
            num_warps=NORM_WARPS[has_tail],
        )
        return stream_TD, normed_TD

    def _scale(self, step: Pass, layer: int, x_TI: Tensor) -> None:
        """Scale the inputs of the attention's output projection in place, with what each row's adapter has."""
        rows, inputs = x_TI.shape
        entry = self.pool.entry(layer, "o_proj")
        adapter_T = step.adapters.adapter_T
        tiles = triton.cdiv(inputs, SCALE_TILE)
        launch = scale_kernel[(rows, tiles)]
        arena = self.arena
        launch(x_TI, adapter_T, entry, arena, inputs, self.stride, N=SCALE_TILE)
