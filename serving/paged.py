"""Attention on a GPU: of one query per sequence over pages, or of runs of rows over their keys.

Shapes: T rows, H query heads, E head size, N places, S keys.
"""

from math import e as euler
from math import log2

import torch
import triton
from torch import Tensor

from serving.cache import Cache
from serving.kernel.attention import attend_kernel, join_kernel
from serving.passing import Pass
from serving.shape import Shape

KEYS_OF_STEP = 64
KEY_WARPS = 2
LEAST_TILE = 16  # that tensor cores take
FOREVER = 2**30  # a window of attention that leaves nothing out


class PagedAttention:
    """Attention over the keys and values of the cache."""

    def __init__(self, shape: Shape, cache: Cache) -> None:
        self.shape = shape
        self.cache = cache
        width = triton.next_power_of_2(shape.head_size)
        self.width = max(LEAST_TILE, width)
        self.window = shape.window or FOREVER
        scale = shape.head_size**-0.5
        # The softmax is one of powers of two: exp(x) = exp2(x log2 e).
        self.scale = scale * log2(euler)

    def attend_runs(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention of runs of rows, with the library's kernel for runs of different lengths."""
        from torch.nn.attention.varlen import varlen_attn

        runs = step.runs
        key_NHE = self.cache.key_LNHE[layer]
        value_NHE = self.cache.value_LNHE[layer]
        key_SHE = key_NHE.index_select(0, runs.place_S)
        value_SHE = value_NHE.index_select(0, runs.place_S)
        seen_back = -1  # all
        if self.shape.window is not None:
            seen_back = self.shape.window - 1
        attended_THE = varlen_attn(
            query_THE, key_SHE, value_SHE, runs.row_N, runs.key_N, runs.rows, runs.keys, window_size=(seen_back, 0)
        )
        assert isinstance(attended_THE, Tensor)
        return attended_THE.flatten(1)

    def attend_rows(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention of one query per sequence over pages; the parts of long sequences are joined afterwards."""
        result_THE = torch.empty_like(query_THE)
        if step.parts == 1:
            # Of peak and mass nothing is written where there is one part.
            self._attend_parts(step, layer, query_THE, result_THE, query_THE, query_THE)
            return result_THE.flatten(1)
        parts = step.parts
        rows, heads, size = query_THE.shape
        part_size = (rows, heads, parts)
        part = query_THE.new_empty(*part_size, size)
        peak = query_THE.new_empty(part_size, dtype=torch.float32)
        mass = torch.empty_like(peak)
        self._attend_parts(step, layer, query_THE, part, peak, mass)
        grid = (rows * heads,)
        width = self.width
        join_kernel[grid](part, peak, mass, result_THE, E=size, W=width, PARTS=parts, num_warps=1)
        return result_THE.flatten(1)

    def _attend_parts(
        self, step: Pass, layer: int, query_THE: Tensor, part: Tensor, peak: Tensor, mass: Tensor
    ) -> None:
        """Write the attention of each part of the keys, and its softmax's peak and mass."""
        shape = self.shape
        pages_TP = step.pages_TP
        assert pages_TP is not None
        key_NHE = self.cache.key_LNHE[layer]
        value_NHE = self.cache.value_LNHE[layer]
        tile = triton.next_power_of_2(shape.queries_of_key)
        tile = max(LEAST_TILE, tile)
        grid = (len(query_THE), shape.kv_heads, step.parts)
        attend_kernel[grid](
            query_THE,
            key_NHE,
            value_NHE,
            pages_TP,
            step.position_T,
            part,
            peak,
            mass,
            pages_TP.stride(0),
            self.scale,
            self.window,
            HEADS=shape.heads,
            KEYS=shape.kv_heads,
            G=tile,
            E=shape.head_size,
            W=self.width,
            S=KEYS_OF_STEP,
            PARTS=step.parts,
            num_warps=KEY_WARPS,
        )
