"""Rounding to bf16 at random, so that a small update is not lost: it moves a weight with a probability that fits it.

A value between two numbers of bf16 becomes the upper one with the probability of its distance from the lower one, so
it is right on average; rounding to the nearest would lose every update below half of that distance (Gupta et al.
2015, arXiv 1502.02551; of bf16 in training Zamirai et al. 2020, arXiv 2010.06192).
"""

import torch
from torch import Tensor

LOST_BITS = 16  # of fp32, which bf16 does not have


class Rounding:
    """Rounding in steps that have numbers; every rank and every repetition of a step rounds alike."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generator = torch.Generator(device)
        self._step = 0

    def begin(self, step: int) -> None:
        """Go on to the step of this number."""
        self._step = step

    def set(self, weight: Tensor, value: Tensor, place: int) -> None:
        """Set weights in bf16 to fp32 values, which are rounded in place; `place` is a number that no others have."""
        seed = hash((self._seed, self._step, place))
        self._generator.manual_seed(seed)
        bits = value.view(torch.int32)
        noise = torch.empty_like(bits)
        between = 2**LOST_BITS  # numbers of fp32 from one of bf16 to the next
        noise.random_(0, between, generator=self._generator)
        bits.add_(noise)
        bits.bitwise_and_(-between)
        weight.copy_(value)
