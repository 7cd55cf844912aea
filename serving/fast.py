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

# Measured on an H200: outputs of a gate's tile and its warps, with adapters and without; warps of a norm, likewise;
# keys that attention takes at a time, and its warps.
GATE, NORM, KEYS = {True: (512, 4), False: (1024, 4)}, {True: 16, False: 4}, (64, 2)
FOREVER = 2**30  # a window of attention that leaves nothing out


class Fast:
    """The operations of a decoder layer."""

    def __init__(self, base: Base, pool: Pool, cache: Cache) -> None:
        self.base, self.shape, self.pool, self.cache = base, base.shape, pool, cache
        self.plain = Plain(base, pool, cache)
        self.arena = pool.arena.data
        self.stride = pool.table_KLSC.stride(0)
        self.width = max(16, triton.next_power_of_2(self.shape.head_size))
        self.heads = gcd(self.shape.heads, self.shape.kv_heads, 8)
        self.varlen = base.dtype != torch.float32
        self.grouped = Grouped(base, pool)

    def entry(self, layer: int, site: str) -> Tensor:
        """The table from an entry on."""
        return self.pool.table_KLSC[0, layer, self.base.sites[site]]

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs of a group, and behind them what decoding needs of narrow adapters."""
        group = self.base.groups[name]
        if step.mix.needs.scales and name == "o":
            self._scale(step, layer, x_TI)
        rows = group.out + len(group.sites) * step.tail
        bias_O = None if group.bias_LN is None else group.bias_LN[layer, :rows]
        with self.grouped.meanwhile(step, group, layer, x_TI) as finish:
            y_TO = linear(x_TI, group.weight_LNI[layer, :rows], bias_O)
        finish(y_TO)
        if step.behind is not None and name in ("o", "down"):
            self.grouped.behind(step.behind, group, layer, y_TO)
        return y_TO

    def norm(
        self, step: Pass, place: Place, x_TD: Tensor, residual_TD: Tensor | None, source: Place | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with x, which is completed, and the stream's norm."""
        layer, name = place
        rows, width = len(x_TD), self.shape.width
        stream_TD, normed_TD = (torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
        origin = self.entry(0, "norm") if source is None else self.entry(source[0], f"{source[1]}_proj")
        block = triton.next_power_of_2(width)
        norm_kernel[(rows,)](
            x_TD, x_TD if residual_TD is None else residual_TD, stream_TD, normed_TD, self.base.norms[name][layer],
            step.mix.slot_T, origin, self.entry(layer, name), self.arena, width, x_TD.stride(0), self.stride,
            self.shape.epsilon, D=block, R=step.ranks, ADD=residual_TD is not None,
            TAIL=source is not None and step.tail > 0, GAIN=source is not None and step.mix.needs.gains,
            OWN=step.mix.needs.norms, num_warps=NORM[step.tail > 0],
        )  # fmt: skip
        return stream_TD, normed_TD

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries; keys and values go to the cache."""
        shape, group = self.shape, self.base.groups["qkv"]
        query_THE = torch.empty(len(y_TO), shape.heads, shape.head_size, dtype=y_TO.dtype, device=y_TO.device)
        norms, first = self.base.norms, self.entry(layer, group.sites[0].name)
        normed, half = "q_norm" in norms, step.cos_TF.shape[1]
        rest = shape.head_size - 2 * half
        weights = [norms[n][layer] if normed else step.cos_TF for n in ("q_norm", "k_norm")]
        owns = [self.entry(layer, n) if normed else first for n in ("q_norm", "k_norm")]
        grid = (len(y_TO), (shape.heads + 2 * shape.kv_heads) // self.heads)
        rotate_kernel[grid](
            y_TO, query_THE, self.cache.key_LNHE[layer], self.cache.value_LNHE[layer], step.place_T, step.cos_TF,
            step.sin_TF, step.mix.slot_T, first, *weights, *owns, self.arena, y_TO.stride(0), self.stride,
            shape.epsilon, group.out, QUERIES=shape.heads, KEYS=shape.kv_heads, SECTIONS=len(group.sites),
            H=self.heads, E=shape.head_size, HALF=half, W=triton.next_power_of_2(max(half, rest)),
            REST=rest > 0, R=step.ranks, TAIL=step.tail > 0, GAIN=step.mix.needs.gains, NORM=normed,
            OWN=step.mix.needs.norms, num_warps=1,
        )  # fmt: skip
        return query_THE

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention: over pages where every row is a sequence, else of runs of rows."""
        if step.pages_TP is not None:
            return self._decode(step, layer, query_THE)
        if not self.varlen:
            return self.plain.attend(step, layer, query_THE)
        from torch.nn.attention.varlen import varlen_attn

        packed = step.runs
        key, value = (x[layer].index_select(0, packed.place_S) for x in (self.cache.key_LNHE, self.cache.value_LNHE))
        window = (-1 if self.shape.window is None else self.shape.window - 1, 0)
        attended = varlen_attn(
            query_THE, key, value, packed.row_N, packed.key_N, packed.rows, packed.keys, window_size=window
        )
        assert isinstance(attended, Tensor)
        return attended.flatten(1)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """What the down projection gets, with what its adapter scales it by."""
        group, inner = self.base.groups["gate_up"], self.shape.mlp
        result_TI = torch.empty(len(y_TO), inner, dtype=y_TO.dtype, device=y_TO.device)
        tile, warps = GATE[step.tail > 0]
        gate_kernel[(len(y_TO), triton.cdiv(inner, tile))](
            y_TO, result_TI, step.mix.slot_T, self.entry(layer, group.sites[0].name), self.entry(layer, "down_proj"),
            self.arena, inner, y_TO.stride(0), self.stride, N=tile, R=step.ranks, SECTIONS=len(group.sites),
            GELU=self.shape.gelu, TAIL=step.tail > 0, GAIN=step.mix.needs.gains, SCALE=step.mix.needs.scales,
            num_warps=warps,
        )  # fmt: skip
        return result_TI

    def _decode(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        assert step.pages_TP is not None
        shape, rows = self.shape, len(query_THE)
        parts = step.parts
        part, result = (torch.empty_like(query_THE) for _ in range(2))
        peak = mass = query_THE
        if parts > 1:
            part = query_THE.new_empty(rows, shape.heads, parts, shape.head_size)
            peak, mass = query_THE.new_empty(2, rows, shape.heads, parts, dtype=torch.float32)
        attend_kernel[(rows, shape.kv_heads, parts)](
            query_THE, self.cache.key_LNHE[layer], self.cache.value_LNHE[layer], step.pages_TP, step.position_T,
            part if parts > 1 else result, peak, mass, step.pages_TP.stride(0),
            shape.head_size**-0.5 * log2(euler), shape.window or FOREVER, HEADS=shape.heads, KEYS=shape.kv_heads,
            G=max(16, triton.next_power_of_2(shape.heads // shape.kv_heads)), E=shape.head_size, W=self.width,
            S=KEYS[0], PAGE=PAGE, PARTS=parts, num_warps=KEYS[1],
        )  # fmt: skip
        if parts > 1:
            join_kernel[(rows * shape.heads,)](
                part, peak, mass, result, E=shape.head_size, W=self.width, PARTS=parts, num_warps=1
            )
        return result.flatten(1)

    def _scale(self, step: Pass, layer: int, x_TI: Tensor) -> None:
        inputs = x_TI.shape[1]
        scale_kernel[(len(x_TI), triton.cdiv(inputs, 1024))](
            x_TI, step.mix.slot_T, self.entry(layer, "o_proj"), self.arena, inputs, self.stride, N=1024
        )
