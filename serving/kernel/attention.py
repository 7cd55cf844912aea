"""Attention of one query per sequence over its keys in the paged cache, with a running softmax in parts.

The parts of long sequences are computed side by side (flash-decoding: Dao et al. 2023, crfm.stanford.edu blog) and
joined. Shapes: G query heads of a key-value head, E head size, S keys of a step.
"""

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    query, keys, values, table, position, result, peak, mass, table_stride, scale, window,
    HEADS: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    PAGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One sequence, key-value head and part of its keys: the part's attention, and its softmax's peak and mass."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(position + row) + 1
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, PARTS), S) * S
    low, high = begin + part * share, tl.minimum(begin + (part + 1) * share, length)
    each: tl.constexpr = HEADS // KEYS
    g, e, s = tl.arange(0, G), tl.arange(0, W), tl.arange(0, S)
    at_GE = (row * HEADS + head * each + g)[:, None] * E + e[None, :]
    mask_GE = (g < each)[:, None] & (e < E)[None, :]
    query_GE = tl.load(query + at_GE, mask=mask_GE, other=0.0)
    peak_G = tl.full((G,), float("-inf"), tl.float32)
    mass_G = tl.zeros((G,), tl.float32)
    sum_GE = tl.zeros((G, W), tl.float32)
    for start in range(low, high, S):
        at_S = start + s
        seen_S = at_S < high
        page_S = tl.load(table + row * table_stride + at_S // PAGE, mask=seen_S, other=0)
        place_S = (page_S * PAGE + at_S % PAGE).to(tl.int64) * KEYS + head
        key_ES = tl.load(keys + place_S[None, :] * E + e[:, None], mask=(e < E)[:, None] & seen_S[None, :], other=0.0)
        score_GS = tl.dot(query_GE, key_ES, input_precision="ieee") * scale
        score_GS = tl.where(seen_S[None, :], score_GS, float("-inf"))
        next_G = tl.maximum(peak_G, tl.max(score_GS, axis=1))
        weight_GS = tl.exp2(score_GS - next_G[:, None])
        shrink_G = tl.exp2(peak_G - next_G)
        value_SE = tl.load(
            values + place_S[:, None] * E + e[None, :], mask=seen_S[:, None] & (e < E)[None, :], other=0.0
        )
        update_GE = tl.dot(weight_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        sum_GE = sum_GE * shrink_G[:, None] + update_GE
        mass_G = mass_G * shrink_G + tl.sum(weight_GS, axis=1)
        peak_G = next_G
    out_GE = sum_GE / tl.where(mass_G > 0, mass_G, 1.0)[:, None]
    cell_G = (row * HEADS + head * each + g) * PARTS + part
    tl.store(result + cell_G[:, None] * E + e[None, :], out_GE.to(result.dtype.element_ty), mask=mask_GE)
    if PARTS > 1:
        tl.store(peak + cell_G, peak_G, mask=g < each)
        tl.store(mass + cell_G, mass_G, mask=g < each)


@triton.jit
def join_kernel(part, peak, mass, result, E: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """The attention of one query head from its parts."""
    cell = tl.program_id(0).to(tl.int64)
    p, e = tl.arange(0, PARTS), tl.arange(0, W)
    peak_P, mass_P = tl.load(peak + cell * PARTS + p), tl.load(mass + cell * PARTS + p)
    weight_P = tl.where(mass_P > 0, mass_P * tl.exp2(peak_P - tl.max(peak_P, axis=0)), 0.0)
    part_PE = tl.load(part + (cell * PARTS + p)[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0).to(
        tl.float32
    )
    out_E = tl.sum(part_PE * weight_P[:, None], axis=0) / tl.sum(weight_P, axis=0)
    tl.store(result + cell * E + e, out_E.to(result.dtype.element_ty), mask=e < E)
