"""AdaLoRA's orthogonality term ||P P^T - I||_F of each factor A = P [R, in] and B = P^T [out, R], and its gradient.

A model has hundreds of small factors, so those of one shape are taken at once. Zhang et al. 2023, arXiv 2303.10512,
equation 4; the norm is not squared here, as in PEFT.
"""

from collections import defaultdict

import torch
from torch import Tensor

from methods.base import Tensors

_OF_B = ".lora_B."  # in the name of a factor


def penalty_gradients(factors: Tensors) -> Tensors:
    """The gradient 2 (P P^T - I) P / ||P P^T - I||_F of each factor's term, by PEFT's names of factors."""
    alike: dict[tuple[bool, torch.Size], list[str]] = defaultdict(list)
    for name, factor in factors.items():
        is_b = _OF_B in name
        alike[is_b, factor.shape].append(name)
    gradients: Tensors = {}
    for (is_b, _), names in alike.items():
        of_one_shape = [factors[name] for name in names]
        stacked = torch.stack(of_one_shape)
        gradients_of_all = _gradients_of_alike(stacked, is_b)
        for name, gradient in zip(names, gradients_of_all, strict=True):
            gradients[name] = gradient
    return gradients


def _gradients_of_alike(factors: Tensor, is_b: bool) -> Tensor:
    """The gradients of M factors of one shape, [M, R, in] or, where they are B, [M, out, R]."""
    turned = factors.mT
    gram_MRR = turned @ factors if is_b else factors @ turned
    rank = gram_MRR.shape[-1]
    identity_RR = torch.eye(rank, device=factors.device)
    excess_MRR = gram_MRR - identity_RR
    norm_M11 = torch.linalg.vector_norm(excess_MRR, dim=(1, 2), keepdim=True)
    precision = torch.finfo(factors.dtype)
    norm_M11 = norm_M11.clamp_min(precision.tiny)
    doubled_MRR = 2 * excess_MRR
    slopes = factors @ doubled_MRR if is_b else doubled_MRR @ factors
    gradients: Tensor = slopes / norm_M11
    return gradients
