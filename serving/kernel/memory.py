"""Reading, multiplying and writing tiles of memory. Shapes: T rows of a tile, N columns."""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def cells(row_T, column_N):
    """Each row's address with each column's number added, [T, N]."""
    row_T1 = row_T[:, None]
    return row_T1 + column_N


@triton.jit
def cells_in(in_T, in_N):
    """Which cells are there, [T, N]: those whose row is there, and their column too."""
    in_T1 = in_T[:, None]
    return in_T1 & in_N


@triton.jit
def column(number_T):
    """Numbers as a column, [T, 1]."""
    return number_T[:, None]


@triton.jit
def load_masked(address, mask):
    """The numbers at some addresses; 0 where the mask says no."""
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def load_float(address, mask):
    """The numbers at some addresses, in fp32; 0 where the mask says no."""
    number = load_masked(address, mask)
    return number.to(tl.float32)


@triton.jit
def load_cells(row_T, column_N, in_T, in_N):
    """The numbers [T, N] at each row's address with each column's number added; 0 where one of them is not there."""
    at_TN = cells(row_T, column_N)
    mask_TN = cells_in(in_T, in_N)
    return load_masked(at_TN, mask_TN)


@triton.jit
def store_cells(row_T, column_N, in_T, in_N, number_TN):
    """Write numbers [T, N] at each row's address with each column's number added, in the type of memory there."""
    at_TN = cells(row_T, column_N)
    mask_TN = cells_in(in_T, in_N)
    store_rounded(at_TN, number_TN, mask_TN)


@triton.jit
def store_rounded(address, number, mask):
    """Write numbers in the type that memory has at their addresses."""
    rounded = number.to(address.dtype.element_ty)
    tl.store(address, rounded, mask=mask)


@triton.jit
def product(left, right):
    """The product of two matrices in fp32, exact where they are fp32 too; one row is no work for tensor cores."""
    if left.shape[0] == 1:
        left_column = tl.trans(left).to(tl.float32)
        weighted = left_column * right.to(tl.float32)
        total = tl.sum(weighted, axis=0)
        return total[None, :]
    else:  # noqa: RET505 (Triton knows the branch that it compiles by its `else`)
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_product(left, right, total):
    """A total in fp32 plus the product of two matrices."""
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def numbers_of(program, N: constexpr):
    """The N numbers that are a program's, where each program has as many."""
    first = program * N
    return first + tl.arange(0, N)
