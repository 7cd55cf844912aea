"""How kernels read an adapter's entry in the table, and add what its narrow factors give.

The columns are those of `serving.packed`. Shapes: R ranks at most, N outputs of a tile.
"""

import triton
import triton.language as tl

from serving import packed

UNIT = tl.constexpr(packed.UNIT)
COLUMNS = tl.constexpr(len(packed.COLUMNS))
RANK = tl.constexpr(packed.RANK)
A = tl.constexpr(packed.A)
B = tl.constexpr(packed.B)
C = tl.constexpr(packed.C)
V = tl.constexpr(packed.V)
M = tl.constexpr(packed.M)
U = tl.constexpr(packed.U)
BIAS = tl.constexpr(packed.BIAS)
BETA = tl.constexpr(packed.BETA)
ACTIVATION = tl.constexpr(packed.ACTIVATION)
TAIL = tl.constexpr(packed.TAIL)
RANKS = tl.constexpr(packed.RANKS)


@triton.jit
def piece(arena, entry, column):
    """The address of one of an entry's pieces."""
    unit = tl.load(entry + column).to(tl.int64)
    return arena + unit * UNIT


@triton.jit
def load_piece(arena, entry, column, n_N, mask_N, other):
    """The numbers n of one of an entry's pieces, in fp32."""
    address_N = piece(arena, entry, column) + n_N
    number_N = tl.load(address_N, mask=mask_N, other=other)
    return number_N.to(tl.float32)


@triton.jit
def add_tail(y_N, y_row, tail, entry, arena, column_N, mask_N, outputs, R: tl.constexpr):
    """y + h B, where h are this row's products with its own A, which lie behind the base's outputs at `tail`.

    Unrolled over R ranks, so that all loads are under way at once; an adapter of fewer ranks skips the others.
    """
    first = tl.load(entry + TAIL)
    rank = tl.where(first < 0, 0, tl.load(entry + RANK))
    h = y_row + tail + first
    b = piece(arena, entry, B) + column_N
    for r in tl.static_range(R):
        in_rank = r < rank
        h_r = tl.load(h + r, mask=in_rank, other=0.0).to(tl.float32)
        b_N = tl.load(b + r * outputs, mask=mask_N & in_rank, other=0.0)
        y_N += h_r * b_N.to(tl.float32)
    return y_N


@triton.jit
def apply_gain(y_N, entry, arena, column_N, mask_N):
    """M * y + beta, where the entry has them."""
    if tl.load(entry + M) >= 0:
        y_N *= load_piece(arena, entry, M, column_N, mask_N, 1.0)
    if tl.load(entry + BETA) >= 0:
        y_N += load_piece(arena, entry, BETA, column_N, mask_N, 0.0)
    return y_N
