"""How kernels read an adapter's entry in the table, and add what its narrow factors give.

The columns are those of `serving.packed`. Shapes: R ranks of a block, N outputs of a tile.
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
    """y + h B, where h are this row's products with its own A, which lie behind the base's outputs at `tail`."""
    first = tl.load(entry + TAIL)
    rank = tl.where(first < 0, 0, tl.load(entry + RANK))
    b = piece(arena, entry, B)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        h_R = tl.load(y_row + tail + first + r, mask=r < rank, other=0.0).to(tl.float32)
        at_RN = b + r[:, None] * outputs + column_N[None, :]
        b_RN = tl.load(at_RN, mask=(r < rank)[:, None] & mask_N[None, :], other=0.0).to(tl.float32)
        y_N += tl.sum(h_R[:, None] * b_RN, axis=0)
    return y_N


@triton.jit
def apply_gain(y_N, entry, arena, column_N, mask_N):
    """M * y + beta, where the entry has them."""
    if tl.load(entry + M) >= 0:
        y_N *= tl.load(piece(arena, entry, M) + column_N, mask=mask_N, other=1.0).to(tl.float32)
    if tl.load(entry + BETA) >= 0:
        y_N += tl.load(piece(arena, entry, BETA) + column_N, mask=mask_N, other=0.0).to(tl.float32)
    return y_N
