"""The cross entropy of labels and its gradient in one kernel, which reads logits from memory once, on a GPU.

Shapes: C labels of a chunk, V tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

BLOCK_TOKENS = 8192
WARPS = 16


@triton.jit
def cross_entropy_kernel(
    logits, labels, scales, losses, row_stride, tokens, IGNORED: constexpr, SLOPES: constexpr, BLOCK: constexpr
):
    """The loss of one row of logits; where SLOPES, its gradient takes their place, times the row's scale."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != IGNORED
    label = tl.where(counts, label, 0)
    logits += row * row_stride
    picked = tl.load(logits + label)
    picked = picked.to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + token, mask=token < tokens, other=float("-inf"))
        logit = logit.to(tl.float32)
        larger = tl.maximum(largest, tl.max(logit, 0))
        share = tl.exp(logit - larger)
        total *= tl.exp(largest - larger)
        total += tl.sum(share, 0)
        largest = larger
    log_sum = largest + tl.log(total)
    loss = log_sum - picked
    loss = tl.where(counts, loss, 0.0)
    tl.store(losses + row, loss)
    if SLOPES:
        scale = tl.load(scales + row)
        scale = tl.where(counts, scale, 0.0)
        tl.debug_barrier()  # every thread has the label's logit before it is overwritten
        for first in range(0, tokens, BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < tokens
            logit = tl.load(logits + token, mask=inside, other=float("-inf"))
            logit = logit.to(tl.float32)
            share = tl.exp(logit - log_sum)
            is_label = token == label
            slope = tl.where(is_label, share - 1.0, share)
            slope *= scale
            slope = slope.to(logits.dtype.element_ty)
            tl.store(logits + token, slope, mask=inside)


def fused_losses(logits_CV: Tensor, label_C: Tensor, scale_C: Tensor | None, ignored: int) -> Tensor:
    """The losses [C], fp32; with scales, the gradients of the scaled losses take the place of the logits."""
    count, tokens = logits_CV.shape
    losses_C = torch.empty(count, dtype=torch.float32, device=logits_CV.device)
    scales = losses_C  # not read
    if scale_C is not None:
        scales = scale_C
    grid = (count,)
    cross_entropy_kernel[grid](
        logits_CV,
        label_C,
        scales,
        losses_C,
        logits_CV.stride(0),
        tokens,
        IGNORED=ignored,
        SLOPES=scale_C is not None,
        BLOCK=BLOCK_TOKENS,
        num_warps=WARPS,
    )
    return losses_C
