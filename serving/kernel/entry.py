"""How kernels read an adapter's entry in the table, and add what its narrow factors give.

The columns are those of `serving.packed`. Shapes: R ranks at most, N outputs of a tile.
"""

import triton
import triton.language as tl

from serving import packed

UNIT = tl.constexpr(packed.UNIT)
COLUMNS = tl.constexpr(len(packed.COLUMNS))
RANK, A, B, C, V = (tl.constexpr(getattr(packed, name)) for name in ("RANK", "A", "B", "C", "V"))
M, U, BIAS, BETA = (tl.constexpr(getattr(packed, name)) for name in ("M", "U", "BIAS", "BETA"))
ACTIVATION, TAIL, RANKS = (tl.constexpr(getattr(packed, name)) for name in ("ACTIVATION", "TAIL", "RANKS"))


@triton.jit
def piece(arena, entry, column):
    """The address of one of an entry's pieces."""
    return arena + tl.load(entry + column).to(tl.int64) * UNIT


@triton.jit
def add_tail(y_N, y_row, tail, entry, arena, column_N, mask_N, outputs, R: tl.constexpr):
    """y + h B, where h are this row's products with its own A, which lie behind the base's outputs at `tail`.

    Unrolled over R ranks, so that all loads are under way at once; an adapter of fewer ranks skips the rest.
    """
    first = tl.load(entry + TAIL)
    rank = tl.where(first < 0, 0, tl.load(entry + RANK))
    h, b = y_row + tail + first, piece(arena, entry, B) + column_N
    for r in tl.static_range(R):
        h_r = tl.load(h + r, mask=r < rank, other=0.0).to(tl.float32)
        b_N = tl.load(b + r * outputs, mask=mask_N & (r < rank), other=0.0).to(tl.float32)
        y_N += h_r * b_N
    return y_N


@triton.jit
def apply_gain(y_N, entry, arena, column_N, mask_N):
    """M * y + beta, where the entry has them."""
    if tl.load(entry + M) >= 0:
        y_N *= tl.load(piece(arena, entry, M) + column_N, mask=mask_N, other=1.0).to(tl.float32)
    if tl.load(entry + BETA) >= 0:
        y_N += tl.load(piece(arena, entry, BETA) + column_N, mask=mask_N, other=0.0).to(tl.float32)
    return y_N
