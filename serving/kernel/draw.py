"""A draw from each row's logits: the largest sum of a scaled logit and its Gumbel noise, block by block.

The noise is that of `serving/sampler.py`: the same bits, of the seed, the number of the token and its id.
Shapes: V tokens of a block.
"""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def mixed_bits(x):
    """32 bits, mixed so that each depends on all."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def gumbel(bits):
    """Noise from 32 bits.

    The inner logarithm is nearly 0 for the largest bits: there it is that of 1 less the rest, in whose place stands
    what is nearest to it in fp32, and the quotient of both rests mends that (Kahan; Goldberg 1991, theorem 4).
    """
    is_large = bits >= 0x80000000
    smaller = tl.where(is_large, 0xFFFFFFFF - bits, bits)
    share = (smaller.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    nearest = tl.where(is_large, 1.0 - share, share)
    exponential = -tl.log(nearest)
    rest = 1.0 - nearest
    mended = tl.where(rest > 0, exponential * share / rest, share)
    return -tl.log(tl.where(is_large, mended, exponential))


@triton.jit
def draw_kernel(
    logits,
    temperature,
    seed,
    number,
    token,
    best,
    chosen,
    most,
    total,
    vocabulary,
    stride,
    BLOCK: constexpr,
):
    """Of a block of a row: the token that is drawn, its sum and its scaled logit; and what a softmax needs."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    id_V = block * BLOCK + tl.arange(0, BLOCK)
    in_V = id_V < vocabulary
    row_logits = logits + row.to(tl.int64) * stride
    logit_V = tl.load(row_logits + id_V, mask=in_V, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    is_warm = heat > 0
    divisor = tl.where(is_warm, heat, 1.0)
    scaled_V = logit_V / divisor
    row_bits = mixed_bits(tl.load(number + row).to(tl.uint32) + 1)
    row_bits = mixed_bits(tl.load(seed + row).to(tl.uint32) ^ row_bits)
    token_bits_V = mixed_bits(id_V.to(tl.uint32))
    noise_V = gumbel(mixed_bits(row_bits ^ token_bits_V))
    noise_V = tl.where(is_warm, noise_V, 0.0)
    sum_V = tl.where(in_V, scaled_V + noise_V, float("-inf"))
    place = tl.argmax(sum_V, 0, tie_break_left=True)
    is_drawn_V = id_V == block * BLOCK + place
    highest = tl.max(scaled_V, 0)
    cell = row * tl.num_programs(1) + block
    tl.store(token + cell, (block * BLOCK + place).to(tl.int64))
    tl.store(best + cell, tl.max(sum_V, 0))
    tl.store(chosen + cell, tl.sum(tl.where(is_drawn_V, scaled_V, 0.0), 0))
    tl.store(most + cell, highest)
    tl.store(total + cell, tl.sum(tl.exp(scaled_V - highest), 0))
