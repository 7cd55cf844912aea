"""The sum of a weight in bf16 and an update that is smaller than what bf16 tells apart.

Rounded to the nearest, such an update would be lost wherever it is below half a step of the weight. Here what decides
between the two neighbours is noise: so the sum is right in the mean, and its error in a product with many inputs is
like that of the product's own rounding. The noise of each element stays the same, so a pass can be repeated.
"""

from typing import Any

import torch
from torch import Tensor

LOWER_BITS = 16  # of fp32, which bf16 has not
HALF = 1 << (LOWER_BITS - 1)
NOISE_SEED = 0


def noise_like(weight_OI: Tensor) -> Tensor:
    """The noise [O, I] of a weight: from -2^15 to 2^15 - 1, in units of the last bit of fp32."""
    generator = torch.Generator()
    generator.manual_seed(NOISE_SEED)
    noise_OI = torch.randint(-HALF, HALF, weight_OI.shape, generator=generator, dtype=torch.int16)
    return noise_OI.to(weight_OI.device)


def dithered_sum(weight_OI: Tensor, update_OI: Tensor, noise_OI: Tensor) -> Tensor:
    """The sum [O, I], bf16; its gradient is that of the update."""
    apply: Any = _DitheredSum.apply
    sum_OI: Tensor = apply(weight_OI, update_OI, noise_OI)
    return sum_OI


class _DitheredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, update_OI: Tensor, noise_OI: Tensor) -> Tensor:
        """Add noise below the bits of bf16, and drop those."""
        ctx.dtype = update_OI.dtype
        exact_OI = weight_OI.float() + update_OI.float()
        bits_OI = exact_OI.view(torch.int32)
        dithered_OI = bits_OI + (noise_OI.int() + HALF)
        lower_bits = (1 << LOWER_BITS) - 1
        kept_OI = dithered_OI & ~lower_bits
        return kept_OI.view(torch.float32).bfloat16()

    @staticmethod
    def backward(ctx: Any, slope_OI: Tensor) -> tuple[None, Tensor, None]:
        """Rounding has no slope of its own."""
        update_slope_OI = slope_OI.to(ctx.dtype)
        return None, update_slope_OI, None
