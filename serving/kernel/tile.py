"""Tiles of rows that share an adapter, and what completes their outputs.

An output row has the base's outputs, and behind them its products h with the A of its adapter.
Shapes: T rows of a tile, N outputs of a tile, R products of a row.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.entry import RANK, TAIL, B, address_of, number_of
from serving.kernel.memory import load_cells, numbers_of


@triton.jit
def rows_of(row, tile, T: constexpr):
    """The numbers in the batch of a tile's rows, and which of them are there: the others are negative."""
    t = numbers_of(tile, T)
    row_T = tl.load(row + t, eviction_policy="evict_last")
    row_T = row_T.to(tl.int64)
    return row_T, row_T >= 0


@triton.jit
def products_of(entry, section, R: constexpr, PLACED: constexpr):
    """Where behind the outputs a row's products with its A begin, and how many they are.

    PLACED: where the entry says, or nowhere; otherwise each section has R.
    """
    rank = number_of(entry, RANK)
    first = section * R
    if PLACED:
        first = number_of(entry, TAIL)
        rank = tl.where(first < 0, 0, rank)
    return first, rank


@triton.jit
def load_factor(arena, entry, rank, column_N, in_N, outputs, R: constexpr):
    """Columns of B, [R, N]; those beyond the adapter's rank are 0."""
    r = tl.arange(0, R)
    in_R = r < rank
    b = address_of(arena, entry, B)
    row_R = b + r * outputs
    return load_cells(row_R, column_N, in_R, in_N)


@triton.jit
def load_products(h_T, in_T, rank, R: constexpr):
    """The products [T, R] of a tile's rows, which begin at h; those beyond the adapter's rank are 0."""
    r = tl.arange(0, R)
    in_R = r < rank
    return load_cells(h_T, r, in_T, in_R)
