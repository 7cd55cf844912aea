"""Rotary positions: heads of a tile of rows, completed, normed where the base does so, turned, and stored.

A head is a first and a second half that are turned into each other, and perhaps a rest that stays.
Shapes: T rows of a tile, E head size, HALF half of what rotates, W the power of two from HALF on, R products of a
row.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.entry import COLUMNS, apply_gain, entry_offset
from serving.kernel.memory import cells, cells_in, column, load_float, load_masked, product, store_rounded
from serving.kernel.norm import norm_weight
from serving.kernel.tile import load_factor, load_products, products_of, rows_of


@triton.jit
def squares(x_TW):
    """The sum of squares of each row, in a column."""
    square_TW = x_TW * x_TW
    sum_T = tl.sum(square_TW, axis=1)
    return column(sum_T)


@triton.jit
def scaled(x_TW, scale_T1, weight, own, arena, w, in_W, OWN: constexpr):
    """A part of a head, times its scale and the norm's weights."""
    weight_W = norm_weight(weight, own, arena, w, in_W, OWN)
    x_TW *= scale_T1
    return x_TW * weight_W


@triton.jit
def normed_head(
    a_TW,
    b_TW,
    c_TW,
    weight,
    own,
    arena,
    w,
    in_W,
    in_rest,
    epsilon,
    E: constexpr,
    HALF: constexpr,
    REST: constexpr,
    OWN: constexpr,
):
    """The halves and the rest of a head, which is normed as a whole."""
    sum_T1 = squares(a_TW)
    sum_T1 += squares(b_TW)
    if REST:
        sum_T1 += squares(c_TW)
    mean_T1 = sum_T1 / E
    scale_T1 = tl.rsqrt(mean_T1 + epsilon)
    a_TW = scaled(a_TW, scale_T1, weight, own, arena, w, in_W, OWN)
    second_w = HALF + w
    b_TW = scaled(b_TW, scale_T1, weight, own, arena, second_w, in_W, OWN)
    if REST:
        rest_w = 2 * HALF + w
        c_TW = scaled(c_TW, scale_T1, weight, own, arena, rest_w, in_rest, OWN)
    return a_TW, b_TW, c_TW


@triton.jit
def part_of_head(head, QUERIES: constexpr, KEYS: constexpr):
    """Whether a head is one of the queries (0), keys (1) or values (2), and the first head of these."""
    values: constexpr = QUERIES + KEYS
    is_behind_queries = head >= QUERIES
    is_behind_keys = head >= values
    part = is_behind_queries.to(tl.int32)
    part += is_behind_keys.to(tl.int32)
    begin = tl.where(part == 1, QUERIES, 0)
    begin = tl.where(part == 2, values, begin)
    return part, begin


@triton.jit
def section_of(part, begin, out, QUERIES: constexpr, KEYS: constexpr, SECTIONS: constexpr, E: constexpr):
    """The linear layer of a part: its number, its first output and its outputs; one has all where they are fused."""
    section, first, outputs = 0, 0, out
    if SECTIONS == 3:
        heads = tl.where(part == 0, QUERIES, KEYS)
        section = part
        first = begin * E
        outputs = heads * E
    return section, first, outputs


@triton.jit
def destination(place, row_T, in_T, head, w, part, QUERIES: constexpr, KEYS: constexpr, E: constexpr):
    """Where a head of these rows goes among the queries, or to each row's place among the keys or the values."""
    head_T = row_T * QUERIES + head
    if part > 0:
        place_T = tl.load(place + row_T, mask=in_T, other=0)
        place_T = place_T.to(tl.int64)
        head_T = place_T * KEYS + head
    first_T = head_T * E
    return cells(first_T, w)


@triton.jit
def angles(cos, sin, row_T, in_T, w, in_W, part, HALF: constexpr):
    """Cosines and sines of the positions of these rows; values are not turned, which is an angle of 0."""
    is_turned = in_T & (part < 2)
    mask_TW = cells_in(is_turned, in_W)
    angle_TW = cells(row_T * HALF, w)
    cos_TW = tl.load(cos + angle_TW, mask=mask_TW, other=1.0)
    sin_TW = load_masked(sin + angle_TW, mask_TW)
    return cos_TW, sin_TW


@triton.jit
def turned(a_TW, b_TW, cos_TW, sin_TW):
    """The two halves of a head, turned into each other."""
    first_TW = a_TW * cos_TW
    first_TW -= b_TW * sin_TW
    second_TW = b_TW * cos_TW
    second_TW += a_TW * sin_TW
    return first_TW, second_TW


@triton.jit
def store_head(first_TW, a_TW, b_TW, c_TW, mask_TW, rest_TW, HALF: constexpr, REST: constexpr):
    """Write the halves and the rest of a head, of which the first half lies there."""
    second_TW = first_TW + HALF
    store_rounded(first_TW, a_TW, mask_TW)
    store_rounded(second_TW, b_TW, mask_TW)
    if REST:
        store_rounded(second_TW + HALF, c_TW, rest_TW)


@triton.jit
def rotate_kernel(
    y, query, keys, values, place, cos, sin, adapter, row, table, weights, own, arena, y_stride, adapter_stride,
    epsilon, out, QUERIES: constexpr, KEYS: constexpr, SECTIONS: constexpr, E: constexpr, HALF: constexpr,
    W: constexpr, T: constexpr, R: constexpr, TAIL: constexpr, PLACED: constexpr, GAIN: constexpr, NORM: constexpr,
    OWN: constexpr,
):  # fmt: skip
    """One head of a tile's rows: norm where the base has one, rotate, and store as query or into the cache.

    `weights` are those of the norms of queries and of keys, `own` the entry of the first of these norms.
    """
    REST: constexpr = E > 2 * HALF
    head = tl.program_id(0)
    tile = tl.program_id(1)
    row_T, in_T = rows_of(row, tile, T)
    part, begin = part_of_head(head, QUERIES, KEYS)
    section, first, outputs = section_of(part, begin, out, QUERIES, KEYS, SECTIONS, E)
    mine = entry_offset(adapter, tile, adapter_stride)
    entry = table + mine + section * COLUMNS
    w = tl.arange(0, W)
    n = head * E + w
    in_W = w < HALF
    in_rest = w < E - 2 * HALF
    y_T = y + row_T * y_stride
    # Read before the first product, behind which all threads wait for each other.
    cos_TW, sin_TW = angles(cos, sin, row_T, in_T, w, in_W, part, HALF)
    at_TW = destination(place, row_T, in_T, head - begin, w, part, QUERIES, KEYS, E)
    a_TW, b_TW, c_TW = completed_head(
        y_T, in_T, n, n - first, in_W, in_rest, entry, arena, out, outputs, section, HALF, REST, R, TAIL, PLACED, GAIN
    )
    if NORM:
        if part < 2:
            weight = weights + part * E
            own += mine + part * COLUMNS
            a_TW, b_TW, c_TW = normed_head(
                a_TW, b_TW, c_TW, weight, own, arena, w, in_W, in_rest, epsilon, E, HALF, REST, OWN
            )
    a_TW, b_TW = turned(a_TW, b_TW, cos_TW, sin_TW)
    mask_TW = cells_in(in_T, in_W)
    rest_TW = cells_in(in_T, in_rest)
    # Not one pointer for all three, whose alignment Triton would not know.
    if part == 0:
        store_head(query + at_TW, a_TW, b_TW, c_TW, mask_TW, rest_TW, HALF, REST)
    if part == 1:
        store_head(keys + at_TW, a_TW, b_TW, c_TW, mask_TW, rest_TW, HALF, REST)
    if part == 2:
        store_head(values + at_TW, a_TW, b_TW, c_TW, mask_TW, rest_TW, HALF, REST)


@triton.jit
def completed_head(
    y_T, in_T, n, column_W, in_W, in_rest, entry, arena, tail, outputs, section,
    HALF: constexpr, REST: constexpr, R: constexpr, TAIL: constexpr, PLACED: constexpr, GAIN: constexpr,
):  # fmt: skip
    """The halves and the rest of a head, complete, in fp32. What is read is read before the first product."""
    second_W = column_W + HALF
    rest_W = column_W + 2 * HALF
    if TAIL:
        first, rank = products_of(entry, section, R, PLACED)
        a_RW = load_factor(arena, entry, rank, column_W, in_W, outputs, R)
        b_RW = load_factor(arena, entry, rank, second_W, in_W, outputs, R)
        if REST:
            c_RW = load_factor(arena, entry, rank, rest_W, in_rest, outputs, R)
    mask_TW = cells_in(in_T, in_W)
    at_TW = cells(y_T, n)
    a_TW = load_float(at_TW, mask_TW)
    b_TW = load_float(at_TW + HALF, mask_TW)
    c_TW = b_TW
    if REST:
        rest_TW = cells_in(in_T, in_rest)
        c_TW = load_float(at_TW + 2 * HALF, rest_TW)
    if TAIL:
        h_T = y_T + tail + first
        h_TR = load_products(h_T, in_T, rank, R)
        a_TW += product(h_TR, a_RW)
        b_TW += product(h_TR, b_RW)
        if REST:
            c_TW += product(h_TR, c_RW)
    if GAIN:
        a_TW = apply_gain(a_TW, entry, arena, column_W, in_W)
        b_TW = apply_gain(b_TW, entry, arena, second_W, in_W)
        if REST:
            c_TW = apply_gain(c_TW, entry, arena, rest_W, in_rest)
    return a_TW, b_TW, c_TW
