"""Adam's moments of a flat vector in a subspace, in fp32 or in 8 bits; gives the step before learning rate and basis.

N = c_t m / (sqrt(v) + eps), c_t = sqrt(1 - beta2^t) / (1 - beta1^t): eps stands before the correction, as in the
authors' implementation.
"""

import math
from typing import Any, Protocol

import torch

from methods.base import Piece
from methods.subspace.matrix import BLOCK


def correction(betas: tuple[float, float], step: int) -> float:
    """c_t, the bias correction of step t = 1, 2, ..."""
    return math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


class Moments(Protocol):
    """What both have."""

    def normalise(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        """Take in the gradient of step t = 1, 2, ... and give N."""
        ...

    def pieces(self, name: str, start: int, own: slice, whole: bool) -> list[Piece]:
        """The part `own` of the state as a checkpoint holds it; it begins at `start` of the matrix `name`."""
        ...


class Adam:
    """fp32 moments."""

    def __init__(self, size: int, betas: tuple[float, float], eps: float, device: torch.device) -> None:
        self.betas, self.eps = betas, eps
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, size, device=device)

    def normalise(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        """Take in the gradient of a step and give N."""
        beta1, beta2 = self.betas
        self.exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        ratio: torch.Tensor = self.exp_avg / self.exp_avg_sq.sqrt().add_(self.eps)
        return ratio.mul_(correction(self.betas, step))

    def pieces(self, name: str, start: int, own: slice, whole: bool) -> list[Piece]:
        """Both moments."""
        tensors = {"exp_avg": self.exp_avg[own], "exp_avg_sq": self.exp_avg_sq[own]}
        return [Piece(f"{name}.subspace", start, tensors, whole)]


class Adam8Bit:
    """Moments in 8 bits with a scale per block of 256 (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes."""

    def __init__(self, size: int, betas: tuple[float, float], eps: float, device: torch.device) -> None:
        from bitsandbytes import functional

        create_dynamic_map: Any = functional.create_dynamic_map
        self.betas, self.eps = betas, eps
        self.states = torch.zeros(2, size, dtype=torch.uint8, device=device)
        self.absmax = torch.zeros(2, size // BLOCK, device=device)
        self.maps: list[Any] = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]

    def normalise(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        """Take in the gradient of a step and give N: what AdamW with learning rate 1 takes off a zero."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        moved = torch.zeros_like(grad)
        if grad.numel():
            hyper: dict[str, Any] = {"beta1": self.betas[0], "beta2": self.betas[1], "beta3": 0.0, "alpha": 0.0}
            hyper |= {"eps": self.eps, "step": step, "lr": 1.0, "qmap1": self.maps[0], "qmap2": self.maps[1]}
            hyper |= {"absmax1": self.absmax[0], "absmax2": self.absmax[1]}
            optimizer_update_8bit_blockwise("adam", grad, moved, self.states[0], self.states[1], **hyper)
        return moved.neg_()

    def pieces(self, name: str, start: int, own: slice, whole: bool) -> list[Piece]:
        """The codes by element, and the scales by block."""
        codes = {"state1": self.states[0, own], "state2": self.states[1, own]}
        blocks = slice(own.start // BLOCK, own.stop // BLOCK)
        scales = {"absmax1": self.absmax[0, blocks], "absmax2": self.absmax[1, blocks]}
        return [
            Piece(f"{name}.subspace", start, codes, whole),
            Piece(f"{name}.blocks", start // BLOCK, scales, whole),
        ]
