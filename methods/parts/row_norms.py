"""The norms of the rows of W + s B A from its factors, without the sum, which is as large as W.

||W_o + s B_o A||^2 = ||W_o||^2 + 2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o.

A model has hundreds of such weights, so all are asked for at once. Shapes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

LARGEST_NORM_RANK = 64  # of the kernel
WeightTensors = list[Tensor]


@torch.library.custom_op("fleetune::row_norms", mutates_args=())
def row_norms(
    weights: WeightTensors,
    a: WeightTensors,
    b: WeightTensors,
    squares: WeightTensors,
    scales: list[float],
) -> Tensor:
    """The norms of all rows of all weights, fp32, one weight after another.

    Of each weight [O, I] there are A [R, I] and B [O, R], which are taken in the weight's dtype, the squares [O] of
    its own rows' norms, fp32, and the scale s.
    """
    outputs = list(map(len, weights))
    rows = sum(outputs)
    first = weights[0]
    norms = torch.empty(rows, dtype=torch.float32, device=first.device)
    norms_of_each = norms.split(outputs)
    if norms.is_cuda and _suit_kernel(weights, a, b):
        from methods.parts.row_norms_kernel import fill_norms

        fill_norms(weights, a, b, squares, scales, norms_of_each)
        return norms
    for number, weight in enumerate(weights):
        a_RI = a[number].to(weight.dtype)
        b_OR = b[number].to(weight.dtype)
        added = _added_squares(weight, a_RI, b_OR, scales[number])
        total = squares[number] + added
        torch.sqrt(total.clamp_min(0), out=norms_of_each[number])
    return norms


@row_norms.register_fake
def _norm_shapes(
    weights: WeightTensors,
    _a: WeightTensors,
    _b: WeightTensors,
    _squares: WeightTensors,
    _scales: list[float],
) -> Tensor:
    first_weight = weights[0]
    outputs = sum(map(len, weights))
    return first_weight.new_empty(outputs, dtype=torch.float32)


def _suit_kernel(weights: WeightTensors, a: WeightTensors, b: WeightTensors) -> bool:
    """Whether weights are all of one dtype and have rows without gaps, and factors of one dtype and a low rank."""
    first_weight = weights[0]
    first_factor = a[0]
    for weight in weights:
        has_gaps = weight.stride(1) != 1
        if has_gaps or weight.dtype != first_weight.dtype:
            return False
    for factor in a + b:
        if factor.dtype != first_factor.dtype:
            return False
    ranks = map(len, a)
    return max(ranks) <= LARGEST_NORM_RANK


def _added_squares(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o, fp32."""
    along_OR = linear(weight_OI, a_RI)
    gram_RR = linear(a_RI, a_RI)
    fp32_OR = b_OR.float()
    mixed_OR = 2 * scale * along_OR.float()
    both_OR = fp32_OR @ gram_RR.float()
    own_OR = scale**2 * both_OR
    summands_OR = fp32_OR * (mixed_OR + own_OR)
    return summands_OR.sum(1)
