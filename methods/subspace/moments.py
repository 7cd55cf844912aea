"""Adam's moments of a flat vector in a subspace, in fp32 or in 8 bits; gives the step before learning rate and basis.

N = c_t m / (sqrt(v) + eps), c_t = sqrt(1 - beta2^t) / (1 - beta1^t): eps stands before the correction, as in the
authors' implementation.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from methods.base import Piece, StatePieces
from methods.subspace.matrix import BLOCK

Betas = tuple[float, float]  # decay rates of the first and of the second moment


def correction(betas: Betas, step: int) -> float:
    """c_t, the bias correction of step t = 1, 2, ..."""
    beta1, beta2 = betas
    second_weight = 1 - beta2**step
    first_weight = 1 - beta1**step
    return math.sqrt(second_weight) / first_weight


class Moments(Protocol):
    """What the moments in fp32 and those in 8 bits have in common."""

    def normalise(self, grad: Tensor, step: int) -> Tensor:
        """Take in the gradient of step t = 1, 2, ... and give N."""
        ...

    def pieces(self, name: str, start: int, part: slice, whole: bool) -> StatePieces:
        """A part of the state as a checkpoint holds it; it begins at `start` of the matrix `name`."""
        ...


class Adam:
    """First and second moments of a flat vector in fp32 (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1)."""

    def __init__(self, size: int, betas: Betas, eps: float, device: torch.device) -> None:
        self.betas = betas
        self.eps = eps
        moments = torch.zeros(2, size, device=device)
        self.exp_avg, self.exp_avg_sq = moments

    def normalise(self, grad: Tensor, step: int) -> Tensor:
        """Take in the gradient of a step and give N."""
        beta1, beta2 = self.betas
        new_share = 1 - beta1
        self.exp_avg.mul_(beta1)
        self.exp_avg.add_(grad, alpha=new_share)
        new_share = 1 - beta2
        self.exp_avg_sq.mul_(beta2)
        self.exp_avg_sq.addcmul_(grad, grad, value=new_share)
        deviation = self.exp_avg_sq.sqrt()
        deviation.add_(self.eps)
        ratio: Tensor = self.exp_avg / deviation
        corrected = correction(self.betas, step)
        return ratio.mul_(corrected)

    def pieces(self, name: str, start: int, part: slice, whole: bool) -> StatePieces:
        """Both moments of a part of the vector, element by element."""
        first = self.exp_avg[part]
        second = self.exp_avg_sq[part]
        tensors = {"exp_avg": first, "exp_avg_sq": second}
        piece = Piece(f"{name}.subspace", start, tensors, whole)
        return [piece]


class Adam8Bit:
    """Moments in 8 bits with a scale per block of 256 (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes."""

    def __init__(self, size: int, betas: Betas, eps: float, device: torch.device) -> None:
        from bitsandbytes import functional

        new_map: Any = functional.create_dynamic_map
        blocks = size // BLOCK
        self.betas = betas
        self.eps = eps
        self.states = torch.zeros(2, size, dtype=torch.uint8, device=device)
        self.absmax = torch.zeros(2, blocks, device=device)
        self.maps: list[Any] = []  # of the first moment, which has a sign, and of the second
        for signed in (True, False):
            codes = new_map(signed=signed)
            codes = codes.to(device)
            self.maps.append(codes)

    def normalise(self, grad: Tensor, step: int) -> Tensor:
        """Take in the gradient of a step and give N: what AdamW with learning rate 1 takes off a zero."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        zero = torch.zeros_like(grad)  # bitsandbytes takes its step off a weight, which is this one
        if grad.numel():
            beta1, beta2 = self.betas
            qmap1, qmap2 = self.maps
            absmax1, absmax2 = self.absmax
            state1, state2 = self.states
            optimizer_update_8bit_blockwise(
                "adam",
                g=grad,
                p=zero,
                state1=state1,
                state2=state2,
                beta1=beta1,
                beta2=beta2,
                beta3=0.0,
                alpha=0.0,
                eps=self.eps,
                step=step,
                lr=1.0,
                qmap1=qmap1,
                qmap2=qmap2,
                absmax1=absmax1,
                absmax2=absmax2,
            )
        return zero.neg_()

    def pieces(self, name: str, start: int, part: slice, whole: bool) -> StatePieces:
        """The codes of a part by element, and its scales by block."""
        states = self.states[:, part]
        state1, state2 = states
        codes = {"state1": state1, "state2": state2}
        by_element = Piece(f"{name}.subspace", start, codes, whole)
        first = part.start // BLOCK
        last = part.stop // BLOCK
        blocks = slice(first, last)
        absmax1, absmax2 = self.absmax[:, blocks]
        scales = {"absmax1": absmax1, "absmax2": absmax2}
        start_block = start // BLOCK
        by_block = Piece(f"{name}.blocks", start_block, scales, whole)
        return [by_element, by_block]
