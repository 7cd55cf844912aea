"""Norms, rotary positions and gates of a decoder layer, which complete the outputs that they read.

An output row y has the base's outputs, and behind them its products with the A of narrow adapters. TAIL: these are
there; GAIN: some adapter has a gain. Shapes: D width, N outputs of a tile, H heads of a tile, E head size, HALF half
of what rotates, W the power of two from HALF on.
"""

import triton
import triton.language as tl

from serving.kernel.entry import COLUMNS, M, U, add_tail, apply_gain, load_piece


@triton.jit
def norm_weight(weight, own, arena, n_N, mask_N, OWN: tl.constexpr):
    """The weight of a norm: the base's, or the adapter's own."""
    weight_N = tl.load(weight + n_N, mask=mask_N, other=0.0)
    if OWN:
        if tl.load(own + M) >= 0:
            weight_N = load_piece(arena, own, M, n_N, mask_N, 0.0)
    return weight_N


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
    mean = tl.sum(x_D * x_D, axis=0) / width
    scale = tl.rsqrt(mean + epsilon)
    weight_D = norm_weight(weight, own + mine, arena, d, in_D, OWN)
    normed_D = x_D * scale * weight_D
    tl.store(normed + row * width + d, normed_D.to(y.dtype.element_ty), mask=in_D)


@triton.jit
def completed(
    y_row, n_N, mask_N, tail, entry, arena, begin, outputs,
    R: tl.constexpr, TAIL: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """The outputs n of a row, complete, in fp32; the section begins at the output `begin`."""
    y_N = tl.load(y_row + n_N, mask=mask_N, other=0.0).to(tl.float32)
    if TAIL:
        y_N = add_tail(y_N, y_row, tail, entry, arena, n_N - begin, mask_N, outputs, R)
    if GAIN:
        y_N = apply_gain(y_N, entry, arena, n_N - begin, mask_N)
    return y_N


@triton.jit
def squares(x_N, H: tl.constexpr, W: tl.constexpr):
    """The sum of squares of each head, for each of its numbers."""
    square_HW = tl.reshape(x_N * x_N, (H, W))
    sum_H = tl.sum(square_HW, axis=1)
    sum_HW = tl.broadcast_to(sum_H[:, None], (H, W))
    return tl.reshape(sum_HW, (H * W,))


@triton.jit
def normed_heads(
    a_N, b_N, c_N, weight, own, arena, f_N, mask_N, rest_N, epsilon,
    H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The halves and the rest of some heads, each head normed."""
    sum_N = squares(a_N, H, W) + squares(b_N, H, W)
    if REST:
        sum_N += squares(c_N, H, W)
    scale_N = tl.rsqrt(sum_N / E + epsilon)
    a_N *= scale_N * norm_weight(weight, own, arena, f_N, mask_N, OWN)
    b_N *= scale_N * norm_weight(weight, own, arena, HALF + f_N, mask_N, OWN)
    if REST:
        c_N *= scale_N * norm_weight(weight, own, arena, 2 * HALF + f_N, rest_N, OWN)
    return a_N, b_N, c_N


@triton.jit
def destination(
    query, keys, values, place, row, head, QUERIES: tl.constexpr, KEYS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Where a row's heads go: to the queries, or to the row's place among the keys or the values."""
    target = query + row * QUERIES * E
    if head >= QUERIES:
        target = keys
        if head >= QUERIES + KEYS:
            target = values
        target += tl.load(place + row).to(tl.int64) * KEYS * E
    return target


@triton.jit
def part_of(head, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Whether a head is one of the queries (0), keys (1) or values (2), and the first head of these."""
    is_behind_queries = (head >= QUERIES).to(tl.int32)
    is_behind_keys = (head >= QUERIES + KEYS).to(tl.int32)
    part = is_behind_queries + is_behind_keys
    begin = tl.where(part == 1, QUERIES, 0)
    begin = tl.where(part == 2, QUERIES + KEYS, begin)
    return part, begin


@triton.jit
def angles(cos, sin, row, part, f_N, mask_N, HALF: tl.constexpr):
    """Cosines and sines of a row's position; values are not turned, which is an angle of 0."""
    turned_N = mask_N & (part < 2)
    cos_N = tl.load(cos + row * HALF + f_N, mask=turned_N, other=1.0)
    sin_N = tl.load(sin + row * HALF + f_N, mask=turned_N, other=0.0)
    return cos_N, sin_N


@triton.jit
def store_turned(y, target, a_N, b_N, cos_N, sin_N, mask_N, HALF: tl.constexpr):
    """Write the two halves of heads, turned into each other, in the type of y."""
    first_N = a_N * cos_N - b_N * sin_N
    second_N = b_N * cos_N + a_N * sin_N
    tl.store(target, first_N.to(y.dtype.element_ty), mask=mask_N)
    tl.store(target + HALF, second_N.to(y.dtype.element_ty), mask=mask_N)


@triton.jit
def rotate_kernel(
    y, query, keys, values, place, cos, sin, slot, table, q_weight, k_weight, q_own, k_own, arena,
    y_stride, slot_stride, epsilon, out,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SECTIONS: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    HALF: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, R: tl.constexpr,
    TAIL: tl.constexpr, GAIN: tl.constexpr, NORM: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: norm where the base has one, rotate, and store as queries or into the cache.

    A head is a first and a second HALF that are turned into each other, and perhaps a rest that stays.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H
    part, begin = part_of(head, QUERIES, KEYS)
    section, first, outputs = 0, 0, out
    if SECTIONS == 3:
        section, first, outputs = part, begin * E, tl.where(part == 0, QUERIES, KEYS) * E
    mine = tl.load(slot + row) * slot_stride
    entry = table + mine + section * COLUMNS
    y_row = y + row * y_stride
    i = tl.arange(0, H * W)
    head_N, f_N = head + i // W, i % W
    at_N = head_N * E
    mask_N = f_N < HALF
    rest_N = f_N < E - 2 * HALF
    a_N = completed(y_row, at_N + f_N, mask_N, out, entry, arena, first, outputs, R, TAIL, GAIN)
    b_N = completed(y_row, at_N + HALF + f_N, mask_N, out, entry, arena, first, outputs, R, TAIL, GAIN)
    c_N = b_N
    if REST:
        c_N = completed(y_row, at_N + 2 * HALF + f_N, rest_N, out, entry, arena, first, outputs, R, TAIL, GAIN)
    if NORM:
        if part < 2:
            weight, own = q_weight, q_own + mine
            if part == 1:
                weight, own = k_weight, k_own + mine
            a_N, b_N, c_N = normed_heads(
                a_N, b_N, c_N, weight, own, arena, f_N, mask_N, rest_N, epsilon, H, E, HALF, W, REST, OWN
            )
    cos_N, sin_N = angles(cos, sin, row, part, f_N, mask_N, HALF)
    target = destination(query, keys, values, place, row, head, QUERIES, KEYS, E) + at_N - begin * E + f_N
    store_turned(y, target, a_N, b_N, cos_N, sin_N, mask_N, HALF)
    if REST:
        tl.store(target + 2 * HALF, c_N.to(y.dtype.element_ty), mask=rest_N)


@triton.jit
def gate_function(x_N, GELU: tl.constexpr):
    """GELU by its approximation with tanh, or SiLU."""
    if GELU:
        cube_N = 0.044715 * x_N * x_N * x_N
        z_N = 0.7978845608028654 * (x_N + cube_N)
        return x_N / (1.0 + tl.exp(-2.0 * z_N))
    else:  # noqa: RET505 (Triton knows the branch that it compiles by its `else`)
        return x_N / (1.0 + tl.exp(-x_N))


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
    # The entries of gate and up, which are one and the same where the base has them in one layer.
    first = table + mine
    second = first + (SECTIONS - 1) * COLUMNS
    outputs = inner if SECTIONS == 2 else 2 * inner
    column = n if SECTIONS == 2 else n + inner
    if TAIL:
        gate_N = add_tail(gate_N, y_row, 2 * inner, first, arena, n, in_N, outputs, R)
        up_N = add_tail(up_N, y_row, 2 * inner, second, arena, column, in_N, outputs, R)
    if GAIN:
        gate_N = apply_gain(gate_N, first, arena, n, in_N)
        up_N = apply_gain(up_N, second, arena, column, in_N)
    x_N = gate_function(gate_N, GELU) * up_N
    if SCALE:
        if tl.load(scales + mine + U) >= 0:
            x_N *= load_piece(arena, scales + mine, U, n, in_N, 1.0)
    tl.store(result + row * inner + n, x_N.to(result.dtype.element_ty), mask=in_N)


@triton.jit
def scale_kernel(x, slot, table, arena, inputs, slot_stride, N: tl.constexpr):
    """x * U in place, for one row."""
    row = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(slot + row) * slot_stride
    if tl.load(entry + U) >= 0:
        n = tl.program_id(1) * N + tl.arange(0, N)
        in_N = n < inputs
        at_N = x + row * inputs + n
        x_N = tl.load(at_N, mask=in_N, other=0.0).to(tl.float32)
        x_N *= load_piece(arena, entry, U, n, in_N, 1.0)
        tl.store(at_N, x_N.to(x.dtype.element_ty), mask=in_N)
