"""Attention of one query per sequence over its keys in the paged cache, with a running softmax in parts.

The parts of long sequences are computed side by side (flash-decoding: Dao et al. 2023, crfm.stanford.edu blog) and
joined. Shapes: G query heads of a key-value head, E head size, W the power of two from E on, S keys of a step.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.cache import PAGE
from serving.kernel.memory import (
    cells,
    cells_in,
    column,
    load_cells,
    load_float,
    load_masked,
    numbers_of,
    product,
    store_rounded,
)

PAGE_TOKENS = constexpr(PAGE)


@triton.jit
def key_range(length, window, part, S: constexpr, PARTS: constexpr):
    """The positions [low, high) of one part of the keys that a query sees; a part has whole steps of S keys."""
    begin = length - window
    begin = tl.maximum(begin, 0)
    seen = length - begin
    keys = tl.cdiv(seen, PARTS)
    steps = tl.cdiv(keys, S)
    share = steps * S
    low = begin + part * share
    high = low + share
    high = tl.minimum(high, length)
    return low, high


@triton.jit
def keys_of(pages, position_S, seen_S, head, KEYS: constexpr, E: constexpr):
    """Where in the cache a head's keys, and its values, of these positions begin."""
    column_S = position_S // PAGE_TOKENS
    offset_S = position_S % PAGE_TOKENS
    page_S = tl.load(pages + column_S, mask=seen_S, other=0)
    place_S = page_S * PAGE_TOKENS + offset_S
    place_S = place_S.to(tl.int64)
    head_S = place_S * KEYS + head
    return head_S * E


@triton.jit
def attention_of(
    query_GE,
    keys,
    values,
    pages,
    low,
    high,
    head,
    scale,
    e,
    in_E,
    KEYS: constexpr,
    G: constexpr,
    E: constexpr,
    W: constexpr,
    S: constexpr,
):
    """The sums of the values [G, W] over positions, each weighted, and the softmax's peaks and masses so far."""
    s = tl.arange(0, S)
    peak_G = tl.full((G,), float("-inf"), tl.float32)
    mass_G = tl.zeros((G,), tl.float32)
    sum_GE = tl.zeros((G, W), tl.float32)
    for start in range(low, high, S):
        position_S = start + s
        seen_S = position_S < high
        at_S = keys_of(pages, position_S, seen_S, head, KEYS, E)
        key_E = keys + e
        value_S = values + at_S
        key_ES = load_cells(key_E, at_S, in_E, seen_S)
        score_GS = product(query_GE, key_ES)
        score_GS *= scale
        score_GS = tl.where(seen_S[None, :], score_GS, float("-inf"))
        weight_GS, shrink_G, peak_G, mass_G = softmax_weights(score_GS, peak_G, mass_G)
        value_SE = load_cells(value_S, e, seen_S, in_E)
        weight_GS = weight_GS.to(value_SE.dtype)
        sum_GE *= column(shrink_G)
        sum_GE += product(weight_GS, value_SE)
    return sum_GE, peak_G, mass_G


@triton.jit
def softmax_weights(score_GS, peak_G, mass_G):
    """The weights of scores, what sums before them shrink by, and the softmax's peak and mass with them."""
    largest_G = tl.max(score_GS, axis=1)
    next_G = tl.maximum(peak_G, largest_G)
    shrink_G = tl.exp2(peak_G - next_G)
    weight_GS = tl.exp2(score_GS - column(next_G))
    mass_G *= shrink_G
    mass_G += tl.sum(weight_GS, axis=1)
    return weight_GS, shrink_G, next_G, mass_G


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    table,
    position,
    result,
    peak,
    mass,
    table_stride,
    scale,
    window,
    HEADS: constexpr,
    KEYS: constexpr,
    G: constexpr,
    E: constexpr,
    W: constexpr,
    S: constexpr,
    PARTS: constexpr,
):
    """One sequence, key-value head and part of its keys: the part's attention, and its softmax's peak and mass."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(position + row) + 1
    low, high = key_range(length, window, part, S, PARTS)
    queries: constexpr = HEADS // KEYS
    g = tl.arange(0, G)
    e = tl.arange(0, W)
    in_G = g < queries
    in_E = e < E
    mask_GE = cells_in(in_G, in_E)
    first_head = row * HEADS + head * queries
    head_G = first_head + g
    at_GE = cells(head_G * E, e)
    query_GE = load_masked(query + at_GE, mask_GE)
    pages = table + row * table_stride
    sum_GE, peak_G, mass_G = attention_of(
        query_GE, keys, values, pages, low, high, head, scale, e, in_E, KEYS, G, E, W, S
    )
    store_part(result, peak, mass, head_G, part, sum_GE, peak_G, mass_G, e, in_G, mask_GE, E, PARTS)


@triton.jit
def store_part(
    result, peak, mass, head_G, part, sum_GE, peak_G, mass_G, e, in_G, mask_GE, E: constexpr, PARTS: constexpr
):
    """Write the attention of a part; where there are several, what joins them too."""
    has_mass_G = mass_G > 0
    whole_G = tl.where(has_mass_G, mass_G, 1.0)
    out_GE = sum_GE / column(whole_G)
    cell_G = head_G * PARTS + part
    first_G = cell_G * E
    at_GE = cells(first_G, e)
    store_rounded(result + at_GE, out_GE, mask_GE)
    if PARTS > 1:
        tl.store(peak + cell_G, peak_G, mask=in_G)
        tl.store(mass + cell_G, mass_G, mask=in_G)


@triton.jit
def weights_of_parts(peak_at_P, mass_at_P):
    """What the values of each part are weighted with, from the peak and mass of its softmax."""
    peak_P = tl.load(peak_at_P)
    mass_P = tl.load(mass_at_P)
    has_mass_P = mass_P > 0
    peak = tl.max(peak_P, axis=0)
    shrink_P = tl.exp2(peak_P - peak)
    return tl.where(has_mass_P, mass_P * shrink_P, 0.0)


@triton.jit
def join_kernel(part, peak, mass, result, E: constexpr, W: constexpr, PARTS: constexpr):
    """The attention of one query head from its parts."""
    cell = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, W)
    in_E = e < E
    cell_P = numbers_of(cell, PARTS)
    weight_P = weights_of_parts(peak + cell_P, mass + cell_P)
    first_P = cell_P * E
    at_PE = cells(first_P, e)
    mask_1E = in_E[None, :]
    weight_P1 = column(weight_P)
    part_PE = load_float(part + at_PE, mask_1E)
    weighted_PE = part_PE * weight_P1
    sum_E = tl.sum(weighted_PE, axis=0)
    whole = tl.sum(weight_P, axis=0)
    out_E = sum_E / whole
    first = result + cell * E
    store_rounded(first + e, out_E, in_E)
