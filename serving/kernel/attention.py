"""Attention of one query per sequence over its keys in the paged cache, with a running softmax in parts.

The parts of long sequences are computed side by side (flash-decoding: Dao et al. 2023, crfm.stanford.edu blog) and
joined. Shapes: G query heads of a key-value head, E head size, S keys of a step.
"""

import triton
import triton.language as tl


@triton.jit
def key_range(length, window, part, S: tl.constexpr, PARTS: tl.constexpr):
    """The positions [low, high) of one part of the keys that a query sees; a part has whole steps of S keys."""
    begin = tl.maximum(length - window, 0)
    keys = tl.cdiv(length - begin, PARTS)
    share = tl.cdiv(keys, S) * S
    low = begin + part * share
    high = tl.minimum(begin + (part + 1) * share, length)
    return low, high


@triton.jit
def attend_kernel(
    query, keys, values, table, position, result, peak, mass, table_stride, scale, window,
    HEADS: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    PAGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One sequence, key-value head and part of its keys: the part's attention, and its softmax's peak and mass."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(position + row) + 1
    low, high = key_range(length, window, part, S, PARTS)
    each: tl.constexpr = HEADS // KEYS
    g, e, s = tl.arange(0, G), tl.arange(0, W), tl.arange(0, S)
    in_G, in_E = g < each, e < E
    head_G = row * HEADS + head * each + g
    at_GE = head_G[:, None] * E + e[None, :]
    mask_GE = in_G[:, None] & in_E[None, :]
    query_GE = tl.load(query + at_GE, mask=mask_GE, other=0.0)
    peak_G = tl.full((G,), float("-inf"), tl.float32)
    mass_G = tl.zeros((G,), tl.float32)
    sum_GE = tl.zeros((G, W), tl.float32)
    for start in range(low, high, S):
        at_S = start + s
        seen_S = at_S < high
        page_S = tl.load(table + row * table_stride + at_S // PAGE, mask=seen_S, other=0)
        place_S = (page_S * PAGE + at_S % PAGE).to(tl.int64) * KEYS + head
        key_ES = load_keys(keys, place_S, seen_S, e, in_E, E)
        score_GS = tl.dot(query_GE, key_ES, input_precision="ieee") * scale
        score_GS = tl.where(seen_S[None, :], score_GS, float("-inf"))
        next_G = tl.maximum(peak_G, tl.max(score_GS, axis=1))
        weight_GS = tl.exp2(score_GS - next_G[:, None])
        shrink_G = tl.exp2(peak_G - next_G)
        value_SE = load_values(values, place_S, seen_S, e, in_E, E)
        update_GE = tl.dot(weight_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        sum_GE = sum_GE * shrink_G[:, None] + update_GE
        mass_G = mass_G * shrink_G + tl.sum(weight_GS, axis=1)
        peak_G = next_G
    out_GE = sum_GE / tl.where(mass_G > 0, mass_G, 1.0)[:, None]
    cell_G = head_G * PARTS + part
    store_part(result, peak, mass, cell_G, out_GE, peak_G, mass_G, e, in_G, mask_GE, E, PARTS)


@triton.jit
def load_keys(keys, place_S, seen_S, e, in_E, E: tl.constexpr):
    """Keys [E, S] from their places, transposed."""
    at_ES = place_S[None, :] * E + e[:, None]
    mask_ES = in_E[:, None] & seen_S[None, :]
    return tl.load(keys + at_ES, mask=mask_ES, other=0.0)


@triton.jit
def load_values(values, place_S, seen_S, e, in_E, E: tl.constexpr):
    """Values [S, E] from their places."""
    at_SE = place_S[:, None] * E + e[None, :]
    mask_SE = seen_S[:, None] & in_E[None, :]
    return tl.load(values + at_SE, mask=mask_SE, other=0.0)


@triton.jit
def store_part(
    result, peak, mass, cell_G, out_GE, peak_G, mass_G, e, in_G, mask_GE, E: tl.constexpr, PARTS: tl.constexpr
):
    """Write the attention of a part; where there are several, what joins them too."""
    at_GE = cell_G[:, None] * E + e[None, :]
    tl.store(result + at_GE, out_GE.to(result.dtype.element_ty), mask=mask_GE)
    if PARTS > 1:
        tl.store(peak + cell_G, peak_G, mask=in_G)
        tl.store(mass + cell_G, mass_G, mask=in_G)


@triton.jit
def join_kernel(part, peak, mass, result, E: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """The attention of one query head from its parts."""
    cell = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    e = tl.arange(0, W)
    in_E = e < E
    peak_P = tl.load(peak + cell * PARTS + p)
    mass_P = tl.load(mass + cell * PARTS + p)
    shrink_P = tl.exp2(peak_P - tl.max(peak_P, axis=0))
    weight_P = tl.where(mass_P > 0, mass_P * shrink_P, 0.0)
    cell_P = cell * PARTS + p
    at_PE = cell_P[:, None] * E + e[None, :]
    part_PE = tl.load(part + at_PE, mask=in_E[None, :], other=0.0).to(tl.float32)
    sum_E = tl.sum(part_PE * weight_P[:, None], axis=0)
    out_E = sum_E / tl.sum(weight_P, axis=0)
    tl.store(result + cell * E + e, out_E.to(result.dtype.element_ty), mask=in_E)
