"""The gate of a feed-forward layer over tiles of rows, and what scales the inputs of a layer.

Shapes: T rows of a tile, N outputs of a tile, R products of a row.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.activation import gate_function
from serving.kernel.entry import COLUMNS, U, apply_gain, entry_offset, has, load_vector
from serving.kernel.memory import (
    cells,
    cells_in,
    load_float,
    numbers_of,
    product,
    store_cells,
    store_rounded,
)
from serving.kernel.tile import load_factor, load_products, products_of, rows_of


@triton.jit
def apply_scale(x, entry, arena, n, in_N):
    """x * U, where the entry has it, for one row or for a tile of rows."""
    if has(entry, U):
        u_N = load_vector(arena, entry, U, n, in_N, 1.0)
        x *= u_N
    return x


@triton.jit
def up_of(entry, n, inner, SECTIONS: constexpr):
    """The entry of up, its columns in the entry's tensors, and the outputs of its linear layer.

    Gate and up are one linear layer, of twice the outputs, where there is one section.
    """
    column, outputs = n, inner
    if SECTIONS == 1:
        column += inner
        outputs = 2 * inner
    else:
        entry += COLUMNS
    return entry, column, outputs


@triton.jit
def gate_kernel(
    y,
    result,
    adapter,
    row,
    table,
    scales,
    arena,
    inner,
    y_stride,
    adapter_stride,
    T: constexpr,
    N: constexpr,
    R: constexpr,
    SECTIONS: constexpr,
    GELU: constexpr,
    TAIL: constexpr,
    PLACED: constexpr,
    GAIN: constexpr,
    SCALE: constexpr,
):
    """act(gate) * up of a tile's rows and some outputs, times what the adapter scales the next inputs with."""
    tile = tl.program_id(1)
    row_T, in_T = rows_of(row, tile, T)
    n = numbers_of(tl.program_id(0), N)
    in_N = n < inner
    mine = entry_offset(adapter, tile, adapter_stride)
    entry = table + mine
    y_T = y + row_T * y_stride
    gate_TN, up_TN = completed_gate(y_T, in_T, n, in_N, entry, arena, inner, R, SECTIONS, TAIL, PLACED, GAIN)
    x_TN = gate_function(gate_TN, GELU) * up_TN
    if SCALE:
        scales += mine
        x_TN = apply_scale(x_TN, scales, arena, n, in_N)
    result_T = result + row_T * inner
    store_cells(result_T, n, in_T, in_N, x_TN)


@triton.jit
def completed_gate(
    y_T,
    in_T,
    n,
    in_N,
    entry,
    arena,
    inner,
    R: constexpr,
    SECTIONS: constexpr,
    TAIL: constexpr,
    PLACED: constexpr,
    GAIN: constexpr,
):
    """The outputs n of gate and up, complete, in fp32. What is read is read before the first product."""
    up_entry, column, outputs = up_of(entry, n, inner, SECTIONS)
    if TAIL:
        gate_first, gate_rank = products_of(entry, 0, R, PLACED)
        up_first, up_rank = products_of(up_entry, SECTIONS - 1, R, PLACED)
        gate_RN = load_factor(arena, entry, gate_rank, n, in_N, outputs, R)
        up_RN = load_factor(arena, up_entry, up_rank, column, in_N, outputs, R)
    mask_TN = cells_in(in_T, in_N)
    at_TN = cells(y_T, n)
    gate_TN = load_float(at_TN, mask_TN)
    up_TN = load_float(at_TN + inner, mask_TN)
    if TAIL:
        h_T = y_T + 2 * inner
        gate_h_T = h_T + gate_first
        up_h_T = h_T + up_first
        gate_TR = load_products(gate_h_T, in_T, gate_rank, R)
        up_TR = load_products(up_h_T, in_T, up_rank, R)
        gate_TN += product(gate_TR, gate_RN)
        up_TN += product(up_TR, up_RN)
    if GAIN:
        gate_TN = apply_gain(gate_TN, entry, arena, n, in_N)
        up_TN = apply_gain(up_TN, up_entry, arena, column, in_N)
    return gate_TN, up_TN


@triton.jit
def scale_kernel(x, adapter, table, arena, inputs, adapter_stride, N: constexpr):
    """x * U in place, for one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    mine = entry_offset(adapter, row, adapter_stride)
    entry = table + mine
    if has(entry, U):
        n = numbers_of(part, N)
        in_N = n < inputs
        x_row = x + row * inputs
        at_N = x_row + n
        x_N = load_float(at_N, in_N)
        x_N = apply_scale(x_N, entry, arena, n, in_N)
        store_rounded(at_N, x_N, in_N)
