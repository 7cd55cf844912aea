"""The kernel of `four_bits.py`, on a GPU: a program makes a few blocks of a weight whole."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from trainer.kernels.four_bits import FourBits, FourBitSizes

BLOCKS = 64  # of a weight, that one program makes whole


@triton.jit
def whole_kernel(
    whole, packed, levels, scales, levels_of_scales, group_scales, offset, numbers,
    BLOCKS: constexpr, BLOCK: constexpr, GROUP: constexpr,
):  # fmt: skip
    """A few blocks of BLOCK numbers. GROUP is how many of their scales share one; 0 where scales are numbers."""
    HALF: constexpr = BLOCK // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    in_weight = block * BLOCK < numbers
    scale = tl.load(scales + block, mask=in_weight, other=0)
    if GROUP:
        level = tl.load(levels_of_scales + scale.to(tl.int32))
        of_group = tl.load(group_scales + block // GROUP, mask=in_weight, other=0.0)
        scale = level * of_group + tl.load(offset)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    two = tl.load(packed + byte, mask=2 * byte < numbers, other=0).to(tl.int32)
    first = tl.load(levels + (two >> 4)) * scale[:, None]
    second = tl.load(levels + (two & 15)) * scale[:, None]
    value = tl.interleave(first, second)
    number = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(whole + number, value.to(whole.dtype.element_ty), mask=number < numbers)


def made_whole(parts: FourBits, sizes: FourBitSizes, dtype: torch.dtype) -> Tensor:
    """A weight [O, I] from its parts."""
    shape = (sizes.outputs, sizes.inputs)
    weight_OI = torch.empty(shape, dtype=dtype, device=parts.packed.device)
    blocks = len(parts.scale_S)
    grid = (triton.cdiv(blocks, BLOCKS),)
    whole_kernel[grid](
        weight_OI, *parts, weight_OI.numel(),
        BLOCKS=BLOCKS, BLOCK=sizes.block, GROUP=sizes.group,
        enable_fp_fusion=False,  # a product and a sum are rounded one by one, as in bitsandbytes
    )  # fmt: skip
    return weight_OI
