"""Norms of a decoder layer, which complete the outputs that they read.

TAIL: behind a row's outputs are its products h with the A of narrow adapters; GAIN: some adapter has a gain; OWN:
some adapter has norms of its own. Shapes: D width, N numbers of a norm, R products of a row.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.entry import RANK, TAIL, B, M, address_of, apply_gain, entry_offset, has, load_vector, number_of
from serving.kernel.memory import load_float, load_masked, store_rounded


@triton.jit
def norm_weight(weight, own, arena, n_N, mask_N, OWN: constexpr):
    """The weight of a norm: the base's, or the adapter's own."""
    weight_N = load_masked(weight + n_N, mask_N)
    if OWN:
        if has(own, M):
            weight_N = load_vector(arena, own, M, n_N, mask_N, 0.0)
    return weight_N


@triton.jit
def add_tail(y_D, y_row, entry, arena, d, in_D, width, R: constexpr):
    """y + h B, where h lie behind the row's outputs.

    Unrolled over R ranks, so that all loads are under way at once; an adapter of fewer ranks skips the others.
    """
    first = number_of(entry, TAIL)
    rank = number_of(entry, RANK)
    rank = tl.where(first < 0, 0, rank)
    h = y_row + width + first
    b = address_of(arena, entry, B)
    b_D = b + d
    for r in tl.static_range(R):
        in_rank = r < rank
        mask_D = in_D & in_rank
        at_D = b_D + r * width
        h_r = load_float(h + r, in_rank)
        b_r = load_float(at_D, mask_D)
        y_D += h_r * b_r
    return y_D


@triton.jit
def completed_row(y_row, entry, arena, d, in_D, width, R: constexpr, TAIL: constexpr, GAIN: constexpr):
    """The outputs of a row, complete, in fp32."""
    y_D = load_float(y_row + d, in_D)
    if TAIL:
        y_D = add_tail(y_D, y_row, entry, arena, d, in_D, width, R)
    if GAIN:
        y_D = apply_gain(y_D, entry, arena, d, in_D)
    return y_D


@triton.jit
def rms_scale(x_D, width, epsilon):
    """What a row is multiplied with, so that its mean square is 1."""
    square_D = x_D * x_D
    mean = tl.sum(square_D, axis=0) / width
    return tl.rsqrt(mean + epsilon)


@triton.jit
def norm_kernel(
    y,
    residual,
    stream,
    normed,
    weight,
    adapter,
    source,
    own,
    arena,
    width,
    y_stride,
    adapter_stride,
    epsilon,
    D: constexpr,
    R: constexpr,
    ADD: constexpr,
    TAIL: constexpr,
    GAIN: constexpr,
    OWN: constexpr,
):
    """stream = residual + y, complete; normed = its RMS norm. `source` and `own` are entries of y and of the norm."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    in_D = d < width
    at_D = row * width + d
    mine = entry_offset(adapter, row, adapter_stride)
    y_row = y + row * y_stride
    weight_D = norm_weight(weight, own + mine, arena, d, in_D, OWN)
    y_D = completed_row(y_row, source + mine, arena, d, in_D, width, R, TAIL, GAIN)
    dtype = y.dtype.element_ty
    x_D = y_D.to(dtype).to(tl.float32)
    if ADD:
        residual_D = load_float(residual + at_D, in_D)
        sum_D = x_D + residual_D
        x_D = sum_D.to(dtype).to(tl.float32)
    store_rounded(stream + at_D, x_D, in_D)
    scale = rms_scale(x_D, width, epsilon)
    normed_D = x_D * scale * weight_D
    store_rounded(normed + at_D, normed_D, in_D)
