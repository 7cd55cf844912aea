"""Low-rank products of many adapters in one launch, over tiles of rows that share an adapter.

`shrink`: h = c * f(x A^T + bias);  `expand`: y += v * (h B) (+ beta). A task is a tile and the first of some ranks;
tiles below 0 are not there. Shapes: T rows of a tile, R ranks of a step, K inputs of a step, N outputs of a tile.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.activation import activated
from serving.kernel.entry import (
    ACTIVATION,
    BETA,
    BIAS,
    COLUMNS,
    RANK,
    A,
    B,
    C,
    V,
    address_of,
    entry_offset,
    has,
    load_vector,
    number_of,
)
from serving.kernel.memory import (
    add_product,
    cells,
    cells_in,
    load_cells,
    load_float,
    load_masked,
    numbers_of,
    store_cells,
    store_rounded,
)
from serving.kernel.tile import rows_of


@triton.jit
def first_products(x_T, in_T, a_R, r, rank, part, share, inputs, T: constexpr, R: constexpr, K: constexpr):
    """x A^T [T, R] over one part of the inputs, in fp32."""
    low = part * share
    high = low + share
    high = tl.minimum(high, inputs)
    k = tl.arange(0, K)
    x_TK = cells(x_T, k)
    a_KR = cells(k, a_R)
    sum_TR = tl.zeros((T, R), tl.float32)
    for start in range(low, high, K):
        position_K = start + k
        in_K = position_K < inputs
        in_R = r < rank
        mask_TK = cells_in(in_T, in_K)
        mask_KR = cells_in(in_K, in_R)
        x_tile = load_masked(x_TK + start, mask_TK)
        a_tile = load_masked(a_KR + start, mask_KR)
        sum_TR = add_product(x_tile, a_tile, sum_TR)
    return sum_TR


@triton.jit
def entry_of(table, adapter, tile, adapter_stride, section):
    """The entry of a tile's adapter for a section; the table starts at a group's first linear layer."""
    first = table + entry_offset(adapter, tile, adapter_stride)
    return first + section * COLUMNS


@triton.jit
def finished_products(sum_TR, entry, arena, r, in_R):
    """c * f(h + bias), with what the entry has."""
    if has(entry, BIAS):
        bias_R = load_vector(arena, entry, BIAS, r, in_R, 0.0)
        code = number_of(entry, ACTIVATION)
        sum_TR = activated(sum_TR + bias_R, code)
    if has(entry, C):
        c_R = load_vector(arena, entry, C, r, in_R, 0.0)
        sum_TR *= c_R
    return sum_TR


@triton.jit
def shrink_kernel(
    x,
    h,
    task,
    adapter,
    row,
    table,
    arena,
    inputs,
    share,
    x_stride,
    h_part,
    h_stride,
    h_section,
    adapter_stride,
    T: constexpr,
    R: constexpr,
    K: constexpr,
):
    """h [part, rows, section, ranks] of one task, section and share of the inputs.

    A bias and an activation need all inputs in one part.
    """
    mine = task + tl.program_id(0) * 2
    section = tl.program_id(1)
    part = tl.program_id(2)
    tile = tl.load(mine)
    if tile < 0:
        return
    entry = entry_of(table, adapter, tile, adapter_stride, section)
    rank = number_of(entry, RANK)
    first = tl.load(mine + 1)
    if first >= rank:
        return
    r = first + tl.arange(0, R)
    row_T, in_T = rows_of(row, tile, T)
    x_T = x + row_T * x_stride
    a_R = address_of(arena, entry, A) + r * inputs
    sum_TR = first_products(x_T, in_T, a_R, r, rank, part, share, inputs, T, R, K)
    in_R = r < rank  # anew, not from the loop: what is stored lies in other threads' registers
    sum_TR = finished_products(sum_TR, entry, arena, r, in_R)
    first_h = h + part * h_part + section * h_section
    h_T = first_h + row_T * h_stride
    store_cells(h_T, r, in_T, in_R, sum_TR)


@triton.jit
def section_of_output(n, out, second, third):
    """The section of an output, where it begins and where it ends; sections begin at 0, `second` and `third`."""
    is_behind_first = n >= second
    is_behind_second = n >= third
    section = is_behind_first.to(tl.int32)
    section += is_behind_second.to(tl.int32)
    is_second = section == 1
    is_third = section == 2
    begin = tl.where(is_second, second, 0)
    begin = tl.where(is_third, third, begin)
    end = tl.where(is_second, third, second)
    end = tl.minimum(end, out)
    end = tl.where(is_third, out, end)
    return section, begin, end


@triton.jit
def ranks_of_share(rank, share, R: constexpr, SHARES: constexpr):
    """The ranks from low to high of one share, which are whole steps of R."""
    ranks = tl.cdiv(rank, SHARES)
    steps = tl.cdiv(ranks, R)
    size = steps * R
    low = share * size
    high = low + size
    high = tl.minimum(high, rank)
    return low, high


@triton.jit
def second_products(
    h_T, in_T, b_N, in_N, rank, share, outputs, T: constexpr, N: constexpr, R: constexpr, SHARES: constexpr
):
    """h B [T, N] over one share of the ranks, in fp32."""
    low, high = ranks_of_share(rank, share, R, SHARES)
    r = tl.arange(0, R)
    h_TR = cells(h_T, r)
    b_RN = cells(r * outputs, b_N)
    sum_TN = tl.zeros((T, N), tl.float32)
    for start in range(low, high, R):
        rank_R = start + r
        in_R = rank_R < high
        b_start = start * outputs
        mask_TR = cells_in(in_T, in_R)
        mask_RN = cells_in(in_R, in_N)
        h_tile = load_masked(h_TR + start, mask_TR)
        b_tile = load_masked(b_RN + b_start, mask_RN)
        sum_TN = add_product(h_tile, b_tile, sum_TN)
    return sum_TN


@triton.jit
def gained(sum_TN, entry, arena, column_N, in_N, BEHIND: constexpr):
    """v * y, where the entry has it; + beta of a bottleneck."""
    if has(entry, V):
        v_N = load_vector(arena, entry, V, column_N, in_N, 0.0)
        sum_TN *= v_N
    if BEHIND:
        beta_N = load_vector(arena, entry, BETA, column_N, in_N, 0.0)
        sum_TN += beta_N
    return sum_TN


@triton.jit
def expand_kernel(
    y,
    h,
    segment,
    adapter,
    row,
    table,
    arena,
    out,
    second,
    third,
    y_share,
    y_stride,
    h_stride,
    h_section,
    adapter_stride,
    T: constexpr,
    R: constexpr,
    N: constexpr,
    SHARES: constexpr,
    BEHIND: constexpr,
):
    """y of one tile's rows, some outputs and one share of the ranks; sections begin at 0, `second` and `third`.

    With one share, y += the products; with several, each is written to a y of its own, for `add_kernel`.
    """
    tile = tl.load(segment + tl.program_id(0))
    if tile < 0:
        return
    first = tl.program_id(1) * N
    share = tl.program_id(2)
    n = first + tl.arange(0, N)
    section, begin, end = section_of_output(first, out, second, third)
    entry = entry_of(table, adapter, tile, adapter_stride, section)
    rank = number_of(entry, RANK)
    if (rank == 0) & (SHARES == 1):
        return
    row_T, in_T = rows_of(row, tile, T)
    h_T = h + section * h_section + row_T * h_stride
    y_T = y + share * y_share + row_T * y_stride
    store_update(y_T, h_T, in_T, n, begin, end, entry, arena, rank, share, T, R, N, SHARES, BEHIND)


@triton.jit
def store_update(
    y_T,
    h_T,
    in_T,
    n,
    begin,
    end,
    entry,
    arena,
    rank,
    share,
    T: constexpr,
    R: constexpr,
    N: constexpr,
    SHARES: constexpr,
    BEHIND: constexpr,
):
    """Add a tile's update of the outputs n to y, or write one of several shares of it; a section is [begin, end)."""
    outputs = end - begin
    column_N = n - begin
    in_N = n < end
    b_N = address_of(arena, entry, B) + column_N
    sum_TN = second_products(h_T, in_T, b_N, in_N, rank, share, outputs, T, N, R, SHARES)
    in_N = n < end  # anew, as in `shrink_kernel`
    sum_TN = gained(sum_TN, entry, arena, column_N, in_N, BEHIND)
    if SHARES == 1:
        there_TN = load_cells(y_T, n, in_T, in_N)
        sum_TN += there_TN.to(tl.float32)
    store_cells(y_T, n, in_T, in_N, sum_TN)


@triton.jit
def add_kernel(
    y, shares, segment, row, out, y_stride, share_stride, share_part, T: constexpr, N: constexpr, SHARES: constexpr
):
    """y += the shares that `expand_kernel` wrote, for one tile's rows and some outputs."""
    number = tl.program_id(0)
    tile = tl.load(segment + number)
    if tile < 0:
        return
    n = numbers_of(tl.program_id(1), N)
    row_T, in_T = rows_of(row, tile, T)
    y_T = y + row_T * y_stride
    share_T = shares + row_T * share_stride
    at_TN = cells(y_T, n)
    share_TN = cells(share_T, n)
    in_N = n < out
    mask_TN = cells_in(in_T, in_N)
    sum_TN = load_float(at_TN, mask_TN)
    for share in tl.static_range(SHARES):
        at_share_TN = share_TN + share * share_part
        sum_TN += load_float(at_share_TN, mask_TN)
    store_rounded(at_TN, sum_TN, mask_TN)
