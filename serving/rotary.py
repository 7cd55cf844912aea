"""Rotary positions of queries and keys on a GPU. Shapes: T rows, O outputs, H query heads, E head size, N places."""

import triton
from torch import Tensor

from serving.base import HEAD_NORMS, Base
from serving.cache import Cache
from serving.grouping import FEW, MANY
from serving.kernel.rotary import rotate_kernel
from serving.passing import Pass
from serving.pool import Pool

ROTATE_WARPS = {FEW: 2, MANY: 4}  # measured on an H200, by the rows of a tile
LEAST_WIDTH = 16  # of a tile of half a head


class RotaryHeads:
    """Launches the kernel that completes, norms, rotates and stores heads."""

    def __init__(self, base: Base, pool: Pool, cache: Cache) -> None:
        self.base = base
        self.shape = base.shape
        self.pool = pool
        self.cache = cache
        self.group = base.groups["qkv"]
        self.heads = base.shape.heads + 2 * base.shape.kv_heads
        self.has_norms = "q_norm" in base.norms

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries [T, H, E], rotated; keys, rotated too, and values go to the cache."""
        tiles = step.grouping.tiles
        needs = step.adapters.needs
        query_THE = y_TO.new_empty(len(y_TO), self.shape.heads, self.shape.head_size)
        grid = (self.heads, tiles.count)
        rotate_kernel[grid](
            y_TO,
            query_THE,
            self.cache.key_LNHE[layer],
            self.cache.value_LNHE[layer],
            step.place_T,
            step.cos_TF,
            step.sin_TF,
            tiles.slot_G,
            tiles.row_GF,
            self.pool.entry(layer, self.group.first_site),
            *self._norms(layer),
            self.pool.arena.data,
            y_TO.stride(0),
            self.pool.slot_stride,
            self.shape.epsilon,
            self.group.outputs,
            step.products,
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

    def _norms(self, layer: int) -> list[Tensor]:
        """The base's weights of the norms of queries and keys, and their entries; any, where there are no norms."""
        if not self.has_norms:
            entry = self.pool.entry(layer, self.group.first_site)
            return [entry] * 4
        weights = [self.base.norms[name][layer] for name in HEAD_NORMS]
        entries = [self.pool.entry(layer, name) for name in HEAD_NORMS]
        return weights + entries

    def _sizes(self, half: int) -> tuple[int, ...]:
        """The sizes of a head that rotates by halves: QUERIES, KEYS, SECTIONS, E, HALF, W and REST of the kernel."""
        shape = self.shape
        rest = shape.head_size - 2 * half
        width = max(LEAST_WIDTH, half, rest)
        tile = triton.next_power_of_2(width)
        return shape.heads, shape.kv_heads, self.group.sections, shape.head_size, half, tile, rest > 0
