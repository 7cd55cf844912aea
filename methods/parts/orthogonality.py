"""AdaLoRA's orthogonality term ||P P^T - I||_F of each factor A = P [R, in] and B = P^T [out, R], and its gradient.

A model has hundreds of small factors, so those of one shape are taken at once: they lie side by side in one vector of
all factors. Zhang et al. 2023, arXiv 2303.10512, equation 4; the norm is not squared here, as in PEFT.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from methods.base import Fragment, View

_OF_B = ".lora_B."  # in the name of a factor


class Alike(NamedTuple):
    """Factors of one shape: where they lie in the vector, and the shape of all, [M, R, in] or for B [M, out, R]."""

    start: int
    stop: int
    shape: tuple[int, ...]
    is_b: bool


class Orthogonality:
    """The terms of all factors of a model, by PEFT's names of factors."""

    def __init__(self, view: View, names: Sequence[str]) -> None:
        starts = self._lay_out(view, names)
        held = []
        for fragment in view.fragments():
            if fragment.name in starts:
                held.append(fragment)
        held.sort(key=lambda fragment: starts[fragment.name])
        self._held: list[Fragment] = held
        self._replicated = view.replicated
        # The vector in parts: what this rank holds of a factor, each after what it does not hold, perhaps nothing.
        self._lengths = []
        end = 0
        for fragment in held:
            start = starts[fragment.name]
            first = start + fragment.start
            last = start + fragment.stop
            self._lengths += [first - end, last - first]
            end = last
        self._lengths.append(self._total - end)

    def _lay_out(self, view: View, names: Sequence[str]) -> dict[str, int]:
        """Where each factor begins in the vector, those of one shape side by side."""
        groups: dict[Any, list[str]] = defaultdict(list)  # by whether they are B, and their shape
        for name in names:
            is_b = _OF_B in name
            groups[is_b, view.shape(name)].append(name)
        starts = {}
        self._groups = []
        end = 0
        for (is_b, shape), alike in groups.items():
            size = shape.numel()
            start = end
            for name in alike:
                starts[name] = end
                end += size
            of_all = (len(alike), *shape)
            group = Alike(start, end, of_all, is_b)
            self._groups.append(group)
        self._total = end
        return starts

    def add_gradients(self, weight: float, device: torch.device) -> None:
        """Add the gradient of the sum of all terms, times a weight, to the gradients; a collective."""
        factors = torch.zeros(self._total, device=device)
        parts = self._parts(factors)
        if parts:
            values = [fragment.parameter.data for fragment in self._held]
            torch._foreach_copy_(parts, values)
        if not self._replicated:
            dist.all_reduce(factors)
        slopes = torch.empty_like(factors)
        for group in self._groups:
            of_group = slice(group.start, group.stop)
            stacked = factors[of_group].view(group.shape)
            gradients = _gradients_of_alike(stacked, group.is_b)
            slopes_of_group = slopes[of_group]
            slopes_of_group.copy_(gradients.flatten())
        grads = []
        added = []
        slopes_of_each = self._parts(slopes)
        for fragment, slope in zip(self._held, slopes_of_each, strict=True):
            grad = fragment.parameter.grad
            if grad is not None:
                grads.append(grad)
                added.append(slope)
        if grads:
            torch._foreach_add_(grads, added, alpha=weight)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """What this rank holds of each factor in a vector of all, in the order of the held."""
        parts = vector.split(self._lengths)
        return list(parts[1::2])


def _gradients_of_alike(factors: Tensor, is_b: bool) -> Tensor:
    """The gradients 2 (P P^T - I) P / ||P P^T - I||_F of M factors, [M, R, in] or, where they are B, [M, out, R]."""
    turned = factors.mT
    gram_MRR = turned @ factors if is_b else factors @ turned
    rank = gram_MRR.shape[-1]
    identity_RR = torch.eye(rank, device=factors.device)
    excess_MRR = gram_MRR - identity_RR
    norm_M11 = torch.linalg.matrix_norm(excess_MRR, keepdim=True)
    precision = torch.finfo(factors.dtype)
    norm_M11 = norm_M11.clamp_min(precision.tiny)
    doubled_MRR = 2 * excess_MRR
    slopes = factors @ doubled_MRR if is_b else doubled_MRR @ factors
    gradients: Tensor = slopes / norm_M11
    return gradients
