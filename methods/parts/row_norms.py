"""The norms of the rows of W + s B A from its factors, without the sum, which is as large as W.

||W_o + s B_o A||^2 = ||W_o||^2 + 2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o.

A model has hundreds of such weights, so all are asked for at once. Shapes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

LARGEST_NORM_RANK = 64  # of the kernel


@torch.library.custom_op("fleetune::row_norms", mutates_args=())
def row_norms(
    weights: list[Tensor], a: list[Tensor], b: list[Tensor], squares: list[Tensor], scales: list[float]
) -> Tensor:
    """The norms of all rows of all weights, fp32, one weight after another.

    Of each weight [O, I] there are A [R, I] and B [O, R], which are taken in the weight's dtype, the squares [O] of
    its own rows' norms, fp32, and the scale s.
    """
    outputs = list(map(len, weights))
    norms = torch.empty(sum(outputs), dtype=torch.float32, device=weights[0].device)
    norms_of_each = norms.split(outputs)
    if norms.is_cuda and _suit_kernel(weights, a, b):
        from methods.parts.row_norms_kernel import fill_norms

        fill_norms(weights, a, b, squares, scales, norms_of_each)
        return norms
    for weight, a_RI, b_OR, square, scale, norm in zip(weights, a, b, squares, scales, norms_of_each, strict=True):
        added = _added_squares(weight, a_RI.to(weight.dtype), b_OR.to(weight.dtype), scale)
        torch.sqrt((square + added).clamp_min(0), out=norm)
    return norms


@row_norms.register_fake
def _norm_shapes(
    weights: list[Tensor], _a: list[Tensor], _b: list[Tensor], _squares: list[Tensor], _scales: list[float]
) -> Tensor:
    outputs = map(len, weights)
    return weights[0].new_empty(sum(outputs), dtype=torch.float32)


def _suit_kernel(weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether weights are all of one dtype and have rows without gaps, and factors of one dtype and a low rank."""
    of_weights = {weight.dtype for weight in weights}
    of_factors = {factor.dtype for factor in a + b}
    if len(of_weights) > 1 or len(of_factors) > 1:
        return False
    if max(map(len, a)) > LARGEST_NORM_RANK:
        return False
    return all(weight.stride(1) == 1 for weight in weights)


def _added_squares(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o, fp32."""
    along_OR = linear(weight_OI, a_RI).float()
    gram_RR = linear(a_RI, a_RI).float()
    fp32_OR = b_OR.float()
    both_OR = fp32_OR @ gram_RR
    summands_OR = fp32_OR * (2 * scale * along_OR + scale**2 * both_OR)
    return summands_OR.sum(1)
