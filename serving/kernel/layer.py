"""Norms, rotary positions and gates of a decoder layer, which complete the outputs that they read.

An output row y has the base's outputs, and behind them at `tail` its products with the A of narrow adapters. TAIL: these
are there; GAIN: some adapter has a gain. Shapes: D width, N outputs of a tile, H heads of a tile, E head
size, W the power of two from E on.
"""

import triton
import triton.language as tl

from serving.kernel.entry import COLUMNS, M, U, add_tail, apply_gain, piece


@triton.jit
def norm_kernel(
    y, residual, stream, normed, weight, slot, source, own, arena, width, y_stride, slot_stride, epsilon,
    D: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr, TAIL: tl.constexpr, GAIN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """stream = residual + y, complete; normed = its RMS norm. `source` and `own` are entries of y and of the norm."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    in_D = d < width
    y_row = y + row * y_stride
    x_D = tl.load(y_row + d, mask=in_D, other=0.0).to(tl.float32)
    mine = tl.load(slot + row) * slot_stride
    if TAIL:
        x_D = add_tail(x_D, y_row, width, source + mine, arena, d, in_D, width, R)
    if GAIN:
        x_D = apply_gain(x_D, source + mine, arena, d, in_D)
    x_D = x_D.to(y.dtype.element_ty).to(tl.float32)
    if ADD:
        x_D += tl.load(residual + row * width + d, mask=in_D, other=0.0).to(tl.float32)
    rounded_D = x_D.to(y.dtype.element_ty)
    tl.store(stream + row * width + d, rounded_D, mask=in_D)
    x_D = rounded_D.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, axis=0) / width + epsilon)
    weight_D = tl.load(weight + d, mask=in_D, other=0.0)
    if OWN:
        if tl.load(own + mine + M) >= 0:
            weight_D = tl.load(piece(arena, own + mine, M) + d, mask=in_D, other=0.0).to(tl.float32)
    tl.store(normed + row * width + d, (x_D * scale * weight_D).to(y.dtype.element_ty), mask=in_D)


@triton.jit
def heads_of(
    y_row, bound, entry, arena, head, first, outputs, e,
    H: tl.constexpr, E: tl.constexpr, W: tl.constexpr, R: tl.constexpr, TAIL: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """The numbers e of some heads, complete, [H, W] in fp32; `first` is the section's first head."""
    heads = head + tl.arange(0, H)
    n_N = tl.reshape(heads[:, None] * E + e[None, :], (H * W,))
    mask_N = tl.reshape((heads[:, None] >= 0) & (e[None, :] < E), (H * W,))
    y_N = tl.load(y_row + n_N, mask=mask_N, other=0.0).to(tl.float32)
    column_N = n_N - first * E
    if TAIL:
        y_N = add_tail(y_N, y_row, bound, entry, arena, column_N, mask_N, outputs, R)
    if GAIN:
        y_N = apply_gain(y_N, entry, arena, column_N, mask_N)
    return tl.reshape(y_N, (H, W))


@triton.jit
def rotate_kernel(
    y, query, keys, values, place, cos, sin, slot, table, q_weight, k_weight, q_own, k_own, arena,
    y_stride, slot_stride, epsilon, half, out,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SECTIONS: tl.constexpr, H: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    R: tl.constexpr, TAIL: tl.constexpr, GAIN: tl.constexpr, NORM: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: norm where the base has one, rotate, and store as queries or into the cache."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H
    is_key, is_value = (head >= QUERIES) & (head < QUERIES + KEYS), head >= QUERIES + KEYS
    part = tl.where(is_value, 2, tl.where(is_key, 1, 0))
    begin = tl.where(is_value, QUERIES + KEYS, tl.where(is_key, QUERIES, 0))
    section = part if SECTIONS == 3 else 0
    first = begin if SECTIONS == 3 else 0
    outputs = tl.where(part == 0, QUERIES, KEYS) * E if SECTIONS == 3 else out
    mine = tl.load(slot + row) * slot_stride
    entry = table + mine + section * COLUMNS
    y_row = y + row * y_stride
    e = tl.arange(0, W)
    in_E = e < E
    x_HE = heads_of(y_row, out, entry, arena, head, first, outputs, e, H, E, W, R, TAIL, GAIN)
    if part < 2:
        turned = e < 2 * half
        other_E = tl.where(turned, tl.where(e < half, e + half, e - half), e)
        other_HE = heads_of(y_row, out, entry, arena, head, first, outputs, other_E, H, E, W, R, TAIL, GAIN)
        if NORM:
            scale_H = tl.rsqrt(tl.sum(x_HE * x_HE, axis=1) / E + epsilon)[:, None]
            weight, own = q_weight, q_own + mine
            if part == 1:
                weight, own = k_weight, k_own + mine
            w_E = tl.load(weight + e, mask=in_E, other=0.0)
            o_E = tl.load(weight + other_E, mask=in_E, other=0.0)
            if OWN:
                if tl.load(own + M) >= 0:
                    w_E = tl.load(piece(arena, own, M) + e, mask=in_E, other=0.0).to(tl.float32)
                    o_E = tl.load(piece(arena, own, M) + other_E, mask=in_E, other=0.0).to(tl.float32)
            x_HE, other_HE = x_HE * scale_H * w_E[None, :], other_HE * scale_H * o_E[None, :]
        angle = row * half + tl.where(e < half, e, e - half)
        cos_E = tl.load(cos + angle, mask=turned, other=1.0)
        sin_E = tl.load(sin + angle, mask=turned, other=0.0)
        x_HE = x_HE * cos_E[None, :] + other_HE * tl.where(e < half, -sin_E, sin_E)[None, :]
    x_HE = x_HE.to(y.dtype.element_ty)
    at_HE = (head - begin + tl.arange(0, H))[:, None] * E + e[None, :]
    if part == 0:
        tl.store(query + row * QUERIES * E + at_HE, x_HE, mask=in_E[None, :])
    else:
        target = keys
        if part == 2:
            target = values
        target += tl.load(place + row).to(tl.int64) * KEYS * E
        tl.store(target + at_HE, x_HE, mask=in_E[None, :])


@triton.jit
def gate_kernel(
    y, result, slot, table, scales, arena, inner, y_stride, slot_stride,
    N: tl.constexpr, R: tl.constexpr, SECTIONS: tl.constexpr, GELU: tl.constexpr,
    TAIL: tl.constexpr, GAIN: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """act(gate) * up of one row and tile, times what the adapter scales the next layer's inputs with."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * N + tl.arange(0, N)
    in_N = n < inner
    y_row = y + row * y_stride
    mine = tl.load(slot + row) * slot_stride
    gate_N = tl.load(y_row + n, mask=in_N, other=0.0).to(tl.float32)
    up_N = tl.load(y_row + inner + n, mask=in_N, other=0.0).to(tl.float32)
    first, second = table + mine, table + mine + (SECTIONS - 1) * COLUMNS
    outputs = inner if SECTIONS == 2 else 2 * inner
    column = n if SECTIONS == 2 else n + inner
    if TAIL:
        gate_N = add_tail(gate_N, y_row, 2 * inner, first, arena, n, in_N, outputs, R)
        up_N = add_tail(up_N, y_row, 2 * inner, second, arena, column, in_N, outputs, R)
    if GAIN:
        gate_N = apply_gain(gate_N, first, arena, n, in_N)
        up_N = apply_gain(up_N, second, arena, column, in_N)
    if GELU:
        z_N = 0.7978845608028654 * (gate_N + 0.044715 * gate_N * gate_N * gate_N)
        gate_N = gate_N / (1.0 + tl.exp(-2.0 * z_N))
    else:
        gate_N = gate_N / (1.0 + tl.exp(-gate_N))
    x_N = gate_N * up_N
    if SCALE:
        if tl.load(scales + mine + U) >= 0:
            x_N *= tl.load(piece(arena, scales + mine, U) + n, mask=in_N, other=1.0).to(tl.float32)
    tl.store(result + row * inner + n, x_N.to(result.dtype.element_ty), mask=in_N)


@triton.jit
def scale_kernel(x, slot, table, arena, inputs, slot_stride, N: tl.constexpr):
    """x * U in place, for one row."""
    row = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(slot + row) * slot_stride
    if tl.load(entry + U) >= 0:
        n = tl.program_id(1) * N + tl.arange(0, N)
        at = x + row * inputs + n
        x_N = tl.load(at, mask=n < inputs, other=0.0).to(tl.float32)
        x_N *= tl.load(piece(arena, entry, U) + n, mask=n < inputs, other=1.0).to(tl.float32)
        tl.store(at, x_N.to(x.dtype.element_ty), mask=n < inputs)
