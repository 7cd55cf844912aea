"""Low-rank products of many adapters in one launch: rows are sorted by adapter, and a tile has rows of one alone.

`shrink`: h = c * f(x A^T + bias);  `expand`: y += v * (h B) (+ beta). A task is (slot, first rank, first row, rows).
Shapes: T rows of a tile, R ranks of a tile, K inputs of a step, N outputs of a tile.
"""

import triton
import triton.language as tl

from serving.kernel.entry import ACTIVATION, BETA, BIAS, RANK, A, B, C, V, piece


@triton.jit
def activated(x, code):
    """none, relu, gelu or silu, by number."""
    gelu = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    silu = x / (1.0 + tl.exp(-x))
    x = tl.where(code == 1, tl.maximum(x, 0.0), x)
    x = tl.where(code == 2, gelu, x)
    return tl.where(code == 3, silu, x)


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
    entry = table + tl.load(mine) * slot_stride + section * columns
    rank, first = tl.load(entry + RANK), tl.load(mine + 1)
    if first >= rank:
        return
    t, r, k = tl.arange(0, T), first + tl.arange(0, R), tl.arange(0, K)
    row_T = tl.load(order + tl.load(mine + 2) + t, mask=t < count, other=0).to(tl.int64)
    x_TK = x + row_T[:, None] * x_stride + k[None, :]
    a_KR = piece(arena, entry, A) + r[None, :] * inputs + k[:, None]
    sum_TR = tl.zeros((T, R), tl.float32)
    low = tl.program_id(2) * share
    for start in range(low, tl.minimum(low + share, inputs), K):
        in_K = start + k < inputs
        x_tile = tl.load(x_TK + start, mask=(t < count)[:, None] & in_K[None, :], other=0.0)
        a_tile = tl.load(a_KR + start, mask=(r < rank)[None, :] & in_K[:, None], other=0.0)
        sum_TR = tl.dot(x_tile, a_tile, sum_TR, input_precision="ieee")
    if tl.load(entry + BIAS) >= 0:
        sum_TR += tl.load(piece(arena, entry, BIAS) + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
        sum_TR = activated(sum_TR, tl.load(entry + ACTIVATION))
    if tl.load(entry + C) >= 0:
        sum_TR *= tl.load(piece(arena, entry, C) + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
    at_TR = h + row_T[:, None] * h_stride + section * h_section + tl.program_id(2) * h_part + r[None, :]
    tl.store(at_TR, sum_TR.to(h.dtype.element_ty), mask=(t < count)[:, None] & (r < rank)[None, :])


@triton.jit
def section_of(n, out, second, third):
    """The section of an output, where it begins and where it ends; sections begin at 0, `second` and `third`."""
    section = (n >= second).to(tl.int32) + (n >= third).to(tl.int32)
    begin = tl.where(section == 2, third, tl.where(section == 1, second, 0))
    end = tl.where(section == 2, out, tl.minimum(tl.where(section == 1, third, second), out))
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
    n0 = tl.program_id(1) * N
    section, begin, end = section_of(n0, out, second, third)
    entry = table + tl.load(mine) * slot_stride + section * columns
    rank = tl.load(entry + RANK)
    if (rank == 0) & (SHARES == 1):
        return
    t, n, r = tl.arange(0, T), n0 + tl.arange(0, N), tl.arange(0, R)
    row_T = tl.load(order + tl.load(mine + 2) + t, mask=t < count, other=0).to(tl.int64)
    b_RN = piece(arena, entry, B) + r[:, None] * (end - begin) + (n - begin)[None, :]
    h_TR = h + row_T[:, None] * h_stride + section * h_section + r[None, :]
    share = tl.cdiv(tl.cdiv(rank, SHARES), R) * R
    low = tl.program_id(2) * share
    sum_TN = tl.zeros((T, N), tl.float32)
    for start in range(low, tl.minimum(low + share, rank), R):
        in_R = start + r < rank
        mask_TR = (t < count)[:, None] & in_R[None, :]
        h_tile = tl.load(h_TR + start, mask=mask_TR, other=0.0)
        b_tile = tl.load(b_RN + start * (end - begin), mask=in_R[:, None] & (n < end)[None, :], other=0.0)
        sum_TN = tl.dot(h_tile, b_tile, sum_TN, input_precision="ieee")
    if tl.load(entry + V) >= 0:
        sum_TN *= tl.load(piece(arena, entry, V) + n - begin, mask=n < end, other=0.0).to(tl.float32)[None, :]
    if BEHIND:
        sum_TN += tl.load(piece(arena, entry, BETA) + n, mask=n < end, other=0.0).to(tl.float32)[None, :]
    at_TN = y + tl.program_id(2) * y_share + row_T[:, None] * y_stride + n[None, :]
    mask_TN = (t < count)[:, None] & (n < end)[None, :]
    if SHARES == 1:
        sum_TN += tl.load(at_TN, mask=mask_TN, other=0.0).to(tl.float32)
    tl.store(at_TN, sum_TN.to(y.dtype.element_ty), mask=mask_TN)


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
    t, n = tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
    row_T = tl.load(order + tl.load(mine + 2) + t, mask=t < count, other=0).to(tl.int64)
    mask_TN = (t < count)[:, None] & (n < out)[None, :]
    at_TN = y + row_T[:, None] * y_stride + n[None, :]
    sum_TN = tl.load(at_TN, mask=mask_TN, other=0.0).to(tl.float32)
    share_TN = shares + row_T[:, None] * share_stride + n[None, :]
    for share in tl.static_range(SHARES):
        sum_TN += tl.load(share_TN + share * share_part, mask=mask_TN, other=0.0)
    tl.store(at_TN, sum_TN.to(y.dtype.element_ty), mask=mask_TN)
