"""Low-rank products of many adapters in one launch: rows are sorted by adapter, and a tile has rows of one alone.

`shrink`: h = c * f(x A^T + bias);  `expand`: y += v * (h B) (+ beta). A task is (slot, first rank, first row, rows).
Shapes: T rows of a tile, R ranks of a tile, K inputs of a step, N outputs of a tile.
"""

import triton
import triton.language as tl

from serving.kernel.entry import ACTIVATION, BETA, BIAS, RANK, A, B, C, V, load_piece, piece


@triton.jit
def activated(x, code):
    """none, relu, gelu or silu, by number."""
    relu = tl.maximum(x, 0.0)
    gelu = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    silu = x / (1.0 + tl.exp(-x))
    x = tl.where(code == 1, relu, x)
    x = tl.where(code == 2, gelu, x)
    return tl.where(code == 3, silu, x)


@triton.jit
def rows_of(order, task, t, in_T):
    """The numbers in the batch of the rows of a task or a segment."""
    first = tl.load(task + 2)
    row_T = tl.load(order + first + t, mask=in_T, other=0)
    return row_T.to(tl.int64)


@triton.jit
def shrink_kernel(
    x, h, task, order, table, arena, inputs, share, x_stride, h_stride, h_section, h_part, slot_stride, columns,
    T: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h [rows, section, part, ranks] of one task, section and share of the inputs; the table starts at a group's
    first site. A bias and an activation need all inputs in one part."""
    mine = task + tl.program_id(0) * 4
    count = tl.load(mine + 3)
    if count == 0:
        return
    section = tl.program_id(1)
    part = tl.program_id(2)
    entry = table + tl.load(mine) * slot_stride + section * columns
    rank = tl.load(entry + RANK)
    first = tl.load(mine + 1)
    if first >= rank:
        return
    t = tl.arange(0, T)
    r = first + tl.arange(0, R)
    k = tl.arange(0, K)
    in_T = t < count
    row_T = rows_of(order, mine, t, in_T)
    x_TK = x + row_T[:, None] * x_stride + k[None, :]
    a_KR = piece(arena, entry, A) + r[None, :] * inputs + k[:, None]
    sum_TR = tl.zeros((T, R), tl.float32)
    low = part * share
    high = tl.minimum(low + share, inputs)
    for start in range(low, high, K):
        in_K = start + k < inputs
        in_R = r < rank
        x_tile = tl.load(x_TK + start, mask=in_T[:, None] & in_K[None, :], other=0.0)
        a_tile = tl.load(a_KR + start, mask=in_R[None, :] & in_K[:, None], other=0.0)
        sum_TR = tl.dot(x_tile, a_tile, sum_TR, input_precision="ieee")
    in_R = r < rank  # anew, not from the loop: what is stored lies in other threads' registers
    if tl.load(entry + BIAS) >= 0:
        sum_TR += load_piece(arena, entry, BIAS, r, in_R, 0.0)[None, :]
        sum_TR = activated(sum_TR, tl.load(entry + ACTIVATION))
    if tl.load(entry + C) >= 0:
        sum_TR *= load_piece(arena, entry, C, r, in_R, 0.0)[None, :]
    at_TR = h + row_T[:, None] * h_stride + section * h_section + part * h_part + r[None, :]
    tl.store(at_TR, sum_TR.to(h.dtype.element_ty), mask=in_T[:, None] & in_R[None, :])


@triton.jit
def section_of(n, out, second, third):
    """The section of an output, where it begins and where it ends; sections begin at 0, `second` and `third`."""
    is_behind_first = (n >= second).to(tl.int32)
    is_behind_second = (n >= third).to(tl.int32)
    section = is_behind_first + is_behind_second
    begin = tl.where(section == 1, second, 0)
    begin = tl.where(section == 2, third, begin)
    end = tl.where(section == 1, third, second)
    end = tl.where(section == 2, out, tl.minimum(end, out))
    return section, begin, end


@triton.jit
def expand_kernel(
    y, h, segment, order, table, arena, out, second, third, y_stride, y_share, h_stride, h_section, slot_stride,
    columns, T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SHARES: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """y of one segment's rows, one tile of outputs and one share of the ranks.

    Sections begin at the outputs 0, `second` and `third`. With one share, y += the products; with several, each share
    is written to a y of its own, for `add_kernel`.
    """
    mine = segment + tl.program_id(0) * 4
    count = tl.load(mine + 3)
    if count == 0:
        return
    first = tl.program_id(1) * N
    part = tl.program_id(2)
    section, begin, end = section_of(first, out, second, third)
    entry = table + tl.load(mine) * slot_stride + section * columns
    rank = tl.load(entry + RANK)
    if (rank == 0) & (SHARES == 1):
        return
    t = tl.arange(0, T)
    n = first + tl.arange(0, N)
    in_T = t < count
    row_T = rows_of(order, mine, t, in_T)
    sum_TN = products(
        h, arena, entry, row_T, n, section, begin, end, rank, part, in_T, h_stride, h_section, T, R, N, SHARES
    )
    in_N = n < end  # anew, as in `shrink_kernel`
    if tl.load(entry + V) >= 0:
        v_N = tl.load(piece(arena, entry, V) + n - begin, mask=in_N, other=0.0)
        sum_TN *= v_N.to(tl.float32)[None, :]
    if BEHIND:
        sum_TN += load_piece(arena, entry, BETA, n, in_N, 0.0)[None, :]
    at_TN = y + part * y_share + row_T[:, None] * y_stride + n[None, :]
    mask_TN = in_T[:, None] & in_N[None, :]
    if SHARES == 1:
        sum_TN += tl.load(at_TN, mask=mask_TN, other=0.0).to(tl.float32)
    tl.store(at_TN, sum_TN.to(y.dtype.element_ty), mask=mask_TN)


@triton.jit
def products(
    h, arena, entry, row_T, n, section, begin, end, rank, part, in_T, h_stride, h_section,
    T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """h B for one share of the ranks, in fp32."""
    outputs = end - begin
    r = tl.arange(0, R)
    b_RN = piece(arena, entry, B) + r[:, None] * outputs + (n - begin)[None, :]
    h_TR = h + row_T[:, None] * h_stride + section * h_section + r[None, :]
    ranks = tl.cdiv(rank, SHARES)
    share = tl.cdiv(ranks, R) * R
    low = part * share
    high = tl.minimum(low + share, rank)
    sum_TN = tl.zeros((T, N), tl.float32)
    for start in range(low, high, R):
        in_R = start + r < rank
        in_N = n < end
        h_tile = tl.load(h_TR + start, mask=in_T[:, None] & in_R[None, :], other=0.0)
        b_tile = tl.load(b_RN + start * outputs, mask=in_R[:, None] & in_N[None, :], other=0.0)
        sum_TN = tl.dot(h_tile, b_tile, sum_TN, input_precision="ieee")
    return sum_TN


@triton.jit
def add_kernel(
    y, shares, segment, order, out, y_stride, share_stride, share_part,
    T: tl.constexpr, N: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """y += the shares that `expand_kernel` wrote, for one segment's rows and one tile of outputs."""
    mine = segment + tl.program_id(0) * 4
    count = tl.load(mine + 3)
    if count == 0:
        return
    t = tl.arange(0, T)
    n = tl.program_id(1) * N + tl.arange(0, N)
    in_T, in_N = t < count, n < out
    row_T = rows_of(order, mine, t, in_T)
    mask_TN = in_T[:, None] & in_N[None, :]
    at_TN = y + row_T[:, None] * y_stride + n[None, :]
    sum_TN = tl.load(at_TN, mask=mask_TN, other=0.0).to(tl.float32)
    share_TN = shares + row_T[:, None] * share_stride + n[None, :]
    for share in tl.static_range(SHARES):
        sum_TN += tl.load(share_TN + share * share_part, mask=mask_TN, other=0.0)
    tl.store(at_TN, sum_TN.to(y.dtype.element_ty), mask=mask_TN)
