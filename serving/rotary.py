"""Rotary positions of queries and keys on a GPU.

Shapes: T rows, O outputs, H query heads, E head size, N places, L layers.
"""

import torch
import triton
from torch import Tensor

from serving.base import HEAD_NORMS, LAST_NORM, Q_NORM, FrozenBase
from serving.cache import Cache
from serving.grouping import FEW, MANY, ONE, SOME
from serving.kernel.rotary import rotate_kernel
from serving.passing import Pass
from serving.pool import Pool

ROTATE_WARPS = {ONE: 1, FEW: 1, SOME: 2, MANY: 4}  # measured on an H200, by the rows of a tile
LEAST_WIDTH = 16  # of a tile of half a head


class RotaryHeads:
    """Launches the kernel that completes, norms, rotates and stores heads."""

    def __init__(self, base: FrozenBase, pool: Pool, cache: Cache) -> None:
        self.shape = base.shape
        self.pool = pool
        self.cache = cache
        self.group = base.groups["qkv"]
        self.has_norms = Q_NORM in base.norms
        # Where there are no norms over heads, nothing is read of their weights and entries.
        self.first_norm = LAST_NORM
        self.weights_LTE = base.embed_VD
        if self.has_norms:
            self.first_norm = Q_NORM
            weights = [base.norms[name] for name in HEAD_NORMS]
            self.weights_LTE = torch.stack(weights, dim=1)

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries [T, H, E], rotated; keys, rotated too, and values go to the cache."""
        tiles = step.tiles
        needs = step.needs
        shape = self.shape
        size = (len(y_TO), shape.heads, shape.head_size)
        query_THE = y_TO.new_empty(size)
        grid = (shape.all_heads, tiles.count)
        rotate_kernel[grid](
            y_TO,
            query_THE,
            self.cache.key_LNHE[layer],
            self.cache.value_LNHE[layer],
            step.place_T,
            step.cos_TF,
            step.sin_TF,
            tiles.adapter_G,
            tiles.row_GF,
            self.pool.entry(layer, self.group.first_linear),
            self.weights_LTE[layer],
            self.pool.entry(layer, self.first_norm),
            self.pool.arena.data,
            y_TO.stride(0),
            self.pool.adapter_stride,
            shape.epsilon,
            self.group.outputs,
            *self._sizes(step.cos_TF.shape[1]),
            T=tiles.rows,
            R=step.products,
            TAIL=step.has_products,
            PLACED=step.is_decoding,
            GAIN=needs.gains,
            NORM=self.has_norms,
            OWN=needs.norms,
            num_warps=ROTATE_WARPS[tiles.rows],
        )
        return query_THE

    def _sizes(self, half: int) -> tuple[int, ...]:
        """The sizes of a head that rotates by halves: QUERIES, KEYS, SECTIONS, E, HALF and W of the kernel."""
        shape = self.shape
        size = shape.head_size
        sections = self.group.sections
        rest = size - 2 * half
        width = max(LEAST_WIDTH, half, rest)
        tile = triton.next_power_of_2(width)
        return shape.heads, shape.kv_heads, sections, size, half, tile
