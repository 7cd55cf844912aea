"""Tiles of rows that share an adapter, and what completes their outputs.

An output row has the base's outputs, and behind them its products h with the A of its adapter.
Shapes: T rows of a tile, N outputs of a tile, R products of a row.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.entry import RANK, TAIL, B, piece
from serving.kernel.memory import cells, cells_in, load_masked, numbers_of


@triton.jit
def rows_of(row, tile, T: constexpr):
    """The numbers in the batch of a tile's rows, and which of them are there: the others are negative."""
    t = numbers_of(tile, T)
    row_T = tl.load(row + t)
    row_T = row_T.to(tl.int64)
    return row_T, row_T >= 0


@triton.jit
def products_of(entry, section, R: constexpr, PLACED: constexpr):
    """Where behind the outputs a row's products with its A begin, and how many they are.

    PLACED: where the entry says, or nowhere; otherwise each section has R.
    """
    rank = tl.load(entry + RANK)
    first = section * R
    if PLACED:
        first = tl.load(entry + TAIL)
        rank = tl.where(first < 0, 0, rank)
    return first, rank


@triton.jit
def load_factor(arena, entry, rank, column_N, in_N, outputs, R: constexpr):
    """Columns of B, [R, N]; those beyond the adapter's rank are 0."""
    r = tl.arange(0, R)
    in_R = r < rank
    b = piece(arena, entry, B)
    row_R = b + r * outputs
    at_RN = cells(row_R, column_N)
    mask_RN = cells_in(in_R, in_N)
    return load_masked(at_RN, mask_RN)


@triton.jit
def load_products(h_T, in_T, rank, R: constexpr):
    """The products [T, R] of a tile's rows, which begin at h; those beyond the adapter's rank are 0."""
    r = tl.arange(0, R)
    in_R = r < rank
    at_TR = cells(h_T, r)
    mask_TR = cells_in(in_T, in_R)
    return load_masked(at_TR, mask_TR)
