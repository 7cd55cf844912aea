"""The operations of a decoder layer as dense products of the library and a few fused kernels, on a GPU.

A pass over prompts adds adapters' updates with grouped kernels (`grouped.py`). A decoding pass takes the first
product of narrow adapters from rows behind the base's weights, in the same dense product as the base's outputs, and
the second one in the kernel that reads those outputs next: so it has no launch of its own for them.
Shapes: T rows, I inputs, O outputs, H query heads, E head size, D width, S keys.
"""

from math import e as euler
from math import gcd, log2

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from serving.adapter import Place
from serving.base import Base
from serving.cache import PAGE, Cache
from serving.grouped import Grouped
from serving.kernel.attention import attend_kernel, join_kernel
from serving.kernel.layer import gate_kernel, norm_kernel, rotate_kernel, scale_kernel
from serving.passing import Pass
from serving.plain import Plain
from serving.pool import Pool

# Measured on an H200, by whether adapters' factors lie behind the base's weights.
GATE_TILE = {True: 512, False: 1024}  # outputs of a gate's tile
NORM_WARPS = {True: 16, False: 4}
GATE_WARPS = 4
KEYS = 64  # that attention takes at a time
KEY_WARPS = 2
SCALE_TILE = 1024
FOREVER = 2**30  # a window of attention that leaves nothing out


class Fast:
    """The operations of a decoder layer."""

    def __init__(self, base: Base, pool: Pool, cache: Cache) -> None:
        self.base = base
        self.shape = base.shape
        self.pool = pool
        self.cache = cache
        self.plain = Plain(base, pool, cache)
        self.arena = pool.arena.data
        self.stride = pool.table_KLSC.stride(0)
        self.width = max(16, triton.next_power_of_2(self.shape.head_size))
        self.heads = gcd(self.shape.heads, self.shape.kv_heads, 8)
        self.varlen = base.dtype != torch.float32
        self.grouped = Grouped(base, pool)

    def entry(self, layer: int, site: str) -> Tensor:
        """The table from an entry on."""
        number = self.base.sites[site]
        return self.pool.table_KLSC[0, layer, number]

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs of a group, and behind them what decoding needs of narrow adapters."""
        group = self.base.groups[name]
        if step.mix.needs.scales and name == "o":
            self._scale(step, layer, x_TI)
        rows = group.out + len(group.sites) * step.tail
        weight_OI = group.weight(layer, rows)
        bias_O = group.bias(layer, rows)
        with self.grouped.meanwhile(step, group, layer, x_TI) as add_updates:
            y_TO = linear(x_TI, weight_OI, bias_O)
        add_updates(y_TO)
        if step.behind is not None and name in ("o", "down"):
            self.grouped.behind(step.behind, group, layer, y_TO)
        return y_TO

    def norm(
        self, step: Pass, place: Place, x_TD: Tensor, residual_TD: Tensor | None, source: Place | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with x, which is completed, and the stream's norm."""
        layer, name = place
        needs, has_tail, width = step.mix.needs, step.tail > 0, self.shape.width
        stream_TD = x_TD.new_empty(len(x_TD), width)
        normed_TD = torch.empty_like(stream_TD)
        weight_D = self.base.norms[name][layer]
        own = self.entry(layer, name)
        adds = residual_TD is not None
        if residual_TD is None:
            residual_TD = x_TD  # of which nothing is read
        is_layer = source is not None  # and not the embedding, which no adapter of a linear layer changes
        origin = self._origin(source)
        norm_kernel[(len(x_TD),)](
            x_TD, residual_TD, stream_TD, normed_TD, weight_D, step.mix.slot_T, origin, own, self.arena, width,
            x_TD.stride(0), self.stride, self.shape.epsilon, D=triton.next_power_of_2(width), R=step.ranks, ADD=adds,
            TAIL=is_layer and has_tail, GAIN=is_layer and needs.gains, OWN=needs.norms,
            num_warps=NORM_WARPS[has_tail],
        )  # fmt: skip
        return stream_TD, normed_TD

    def _origin(self, source: Place | None) -> Tensor:
        """The entry of the linear layer that a norm's input comes from; of none, any entry, which is not read."""
        if source is None:
            return self.entry(0, "norm")
        layer, name = source
        return self.entry(layer, f"{name}_proj")

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries; keys and values go to the cache."""
        shape = self.shape
        rows = len(y_TO)
        query_THE = y_TO.new_empty(rows, shape.heads, shape.head_size)
        key_NHE = self.cache.key_LNHE[layer]
        value_NHE = self.cache.value_LNHE[layer]
        group = self.base.groups["qkv"]
        first = self.entry(layer, group.sites[0].name)
        has_norms = "q_norm" in self.base.norms
        q_weight = k_weight = step.cos_TF  # of which nothing is read where there are no norms
        q_own = k_own = first
        if has_norms:
            q_weight, q_own = self._head_norm(layer, "q_norm")
            k_weight, k_own = self._head_norm(layer, "k_norm")
        half = step.cos_TF.shape[1]
        rest = shape.head_size - 2 * half
        tile_width = triton.next_power_of_2(max(half, rest))
        heads = shape.heads + 2 * shape.kv_heads
        mix, needs = step.mix, step.mix.needs
        rotate_kernel[(rows, heads // self.heads)](
            y_TO, query_THE, key_NHE, value_NHE, step.place_T, step.cos_TF, step.sin_TF, mix.slot_T, first, q_weight,
            k_weight, q_own, k_own, self.arena, y_TO.stride(0), self.stride, shape.epsilon, group.out,
            QUERIES=shape.heads, KEYS=shape.kv_heads, SECTIONS=len(group.sites), H=self.heads, E=shape.head_size,
            HALF=half, W=tile_width, REST=rest > 0, R=step.ranks, TAIL=step.tail > 0, GAIN=needs.gains,
            NORM=has_norms, OWN=needs.norms, num_warps=1,
        )  # fmt: skip
        return query_THE

    def _head_norm(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """The base's weight of a norm over heads, and the norm's entry."""
        weight_LE = self.base.norms[name]
        return weight_LE[layer], self.entry(layer, name)

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention: over pages where every row is a sequence, else of runs of rows."""
        if step.pages_TP is not None:
            return self._decode(step, layer, query_THE)
        if not self.varlen:
            return self.plain.attend(step, layer, query_THE)
        return self._attend_runs(step, layer, query_THE)

    def _attend_runs(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention of runs of rows, with the library's kernel for runs of different lengths."""
        from torch.nn.attention.varlen import varlen_attn

        runs = step.runs
        key_SHE = self.cache.key_LNHE[layer].index_select(0, runs.place_S)
        value_SHE = self.cache.value_LNHE[layer].index_select(0, runs.place_S)
        seen_back = -1  # all
        if self.shape.window is not None:
            seen_back = self.shape.window - 1
        attended_THE = varlen_attn(
            query_THE, key_SHE, value_SHE, runs.row_N, runs.key_N, runs.rows, runs.keys, window_size=(seen_back, 0)
        )
        assert isinstance(attended_THE, Tensor)
        return attended_THE.flatten(1)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """What the down projection gets, with what its adapter scales it by."""
        inner = self.shape.mlp
        result_TI = y_TO.new_empty(len(y_TO), inner)
        sites = self.base.groups["gate_up"].sites
        first = self.entry(layer, sites[0].name)
        scales = self.entry(layer, "down_proj")
        mix, needs = step.mix, step.mix.needs
        has_tail = step.tail > 0
        tile = GATE_TILE[has_tail]
        grid = (len(y_TO), triton.cdiv(inner, tile))
        gate_kernel[grid](
            y_TO, result_TI, mix.slot_T, first, scales, self.arena, inner, y_TO.stride(0), self.stride, N=tile,
            R=step.ranks, SECTIONS=len(sites), GELU=self.shape.gelu, TAIL=has_tail, GAIN=needs.gains,
            SCALE=needs.scales, num_warps=GATE_WARPS,
        )  # fmt: skip
        return result_TI

    def _decode(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention of one query per sequence over pages; the parts of long sequences are joined afterwards."""
        assert step.pages_TP is not None
        shape, parts = self.shape, step.parts
        rows = len(query_THE)
        result_THE = torch.empty_like(query_THE)
        part = result_THE
        peak = mass = query_THE  # which nothing is written to where there is one part
        if parts > 1:
            part = query_THE.new_empty(rows, shape.heads, parts, shape.head_size)
            peak, mass = query_THE.new_empty(2, rows, shape.heads, parts, dtype=torch.float32)
        key_NHE = self.cache.key_LNHE[layer]
        value_NHE = self.cache.value_LNHE[layer]
        # The softmax is one of powers of two: exp(x) = exp2(x log2 e).
        scale = shape.head_size**-0.5 * log2(euler)
        window = shape.window or FOREVER
        heads = shape.heads // shape.kv_heads
        tile = max(16, triton.next_power_of_2(heads))
        attend_kernel[(rows, shape.kv_heads, parts)](
            query_THE, key_NHE, value_NHE, step.pages_TP, step.position_T, part, peak, mass, step.pages_TP.stride(0),
            scale, window, HEADS=shape.heads, KEYS=shape.kv_heads, G=tile, E=shape.head_size, W=self.width, S=KEYS,
            PAGE=PAGE, PARTS=parts, num_warps=KEY_WARPS,
        )  # fmt: skip
        if parts > 1:
            join_kernel[(rows * shape.heads,)](
                part, peak, mass, result_THE, E=shape.head_size, W=self.width, PARTS=parts, num_warps=1
            )
        return result_THE.flatten(1)

    def _scale(self, step: Pass, layer: int, x_TI: Tensor) -> None:
        """Scale the inputs of the attention's output projection in place, with what each row's adapter has."""
        rows, inputs = x_TI.shape
        entry = self.entry(layer, "o_proj")
        grid = (rows, triton.cdiv(inputs, SCALE_TILE))
        scale_kernel[grid](x_TI, step.mix.slot_T, entry, self.arena, inputs, self.stride, N=SCALE_TILE)
