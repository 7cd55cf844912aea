"""How kernels read an adapter's entry in the table. The columns are those of `serving.packed`."""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.packed import UNIT, Column

ELEMENTS = constexpr(UNIT)  # of a unit
COLUMNS = constexpr(len(Column))
RANK = constexpr(Column.RANK.value)
A = constexpr(Column.A.value)
B = constexpr(Column.B.value)
C = constexpr(Column.C.value)
V = constexpr(Column.V.value)
M = constexpr(Column.M.value)
U = constexpr(Column.U.value)
BIAS = constexpr(Column.BIAS.value)
BETA = constexpr(Column.BETA.value)
ACTIVATION = constexpr(Column.ACTIVATION.value)
TAIL = constexpr(Column.TAIL.value)
RANKS = constexpr(Column.RANKS.value)


@triton.jit
def number_of(entry, column):
    """One of an entry's numbers, which every step reads: the device's cache is to keep it."""
    at = entry + column
    return tl.load(at, eviction_policy="evict_last")


@triton.jit
def entry_offset(adapter, row, adapter_stride):
    """Where in the table the entries of a row's (or a tile's) adapter begin."""
    at = adapter + row
    number = tl.load(at, eviction_policy="evict_last")
    return number * adapter_stride


@triton.jit
def has(entry, column):
    """Whether an entry has one of its tensors."""
    unit = number_of(entry, column)
    return unit >= 0


@triton.jit
def address_of(arena, entry, column):
    """The address of one of an entry's tensors."""
    unit = number_of(entry, column)
    unit = unit.to(tl.int64)
    return arena + unit * ELEMENTS


@triton.jit
def load_vector(arena, entry, column, n_N, mask_N, other):
    """The numbers n of one of an entry's tensors, in fp32."""
    first = address_of(arena, entry, column)
    at_N = first + n_N
    number_N = tl.load(at_N, mask=mask_N, other=other)
    return number_N.to(tl.float32)


@triton.jit
def apply_gain(y, entry, arena, column_N, mask_N):
    """M * y + beta, where the entry has them, for one row or for a tile of rows."""
    if has(entry, M):
        m_N = load_vector(arena, entry, M, column_N, mask_N, 1.0)
        y *= m_N
    if has(entry, BETA):
        beta_N = load_vector(arena, entry, BETA, column_N, mask_N, 0.0)
        y += beta_N
    return y
