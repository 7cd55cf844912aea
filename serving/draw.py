"""Draws over a whole vocabulary on a GPU, in one reading of the logits.

Shapes: T rows, V vocabulary, B its blocks.
"""

import torch
import triton
from torch import Tensor

from serving.kernel.draw import draw_kernel
from serving.sampler import NextTokens

DRAW_BLOCK = 4096  # tokens of the vocabulary that a program reads
DRAW_WARPS = 8


def draw(logits_TV: Tensor, temperature_T: Tensor, seed_T: Tensor, number_T: Tensor) -> NextTokens:
    """A token for each row, drawn as `sampler.py` says, and its log-probability at the row's temperature."""
    rows, vocabulary = logits_TV.shape
    blocks = triton.cdiv(vocabulary, DRAW_BLOCK)
    size = (rows, blocks)
    token_TB = torch.empty(size, dtype=torch.int64, device=logits_TV.device)
    best_TB, chosen_TB, most_TB, total_TB = logits_TV.new_empty((4, *size), dtype=torch.float32)
    draw_kernel[size](
        logits_TV,
        temperature_T,
        seed_T,
        number_T,
        token_TB,
        best_TB,
        chosen_TB,
        most_TB,
        total_TB,
        vocabulary,
        logits_TV.stride(0),
        BLOCK=DRAW_BLOCK,
        num_warps=DRAW_WARPS,
    )
    block_T1 = best_TB.argmax(1, keepdim=True)
    token_T = token_TB.gather(1, block_T1).flatten()
    chosen_T = chosen_TB.gather(1, block_T1).flatten()
    mass_TB = most_TB + total_TB.log()
    return NextTokens(token_T, chosen_T - mass_TB.logsumexp(1))
