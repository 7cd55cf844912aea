"""The norms of the rows of W + s B A from its factors, without the sum, which is as large as W.

||W_o + s B_o A||^2 = ||W_o||^2 + 2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o.

Shapes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

LARGEST_NORM_RANK = 64  # of the kernel


@torch.library.custom_op("fleetune::row_norms", mutates_args=())
def row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, square_O: Tensor, scale: float) -> Tensor:
    """The norms [O], fp32, where `square_O` has the squares of those of W, fp32; factors are taken in W's dtype."""
    a_RI = a_RI.to(weight_OI.dtype)
    b_OR = b_OR.to(weight_OI.dtype)
    if weight_OI.is_cuda and len(a_RI) <= LARGEST_NORM_RANK:
        from methods.parts.row_norms_kernel import added_squares

        added_O = added_squares(weight_OI, a_RI, b_OR, scale)
    else:
        along_OR = linear(weight_OI, a_RI).float()
        gram_RR = linear(a_RI, a_RI).float()
        fp32_OR = b_OR.float()
        both_OR = fp32_OR @ gram_RR
        added_O = (fp32_OR * (2 * scale * along_OR + scale**2 * both_OR)).sum(1)
    return (square_O + added_O).clamp_min(0).sqrt()


@row_norms.register_fake
def _norm_shapes(_weight: Tensor, _a: Tensor, _b: Tensor, square_O: Tensor, _scale: float) -> Tensor:
    return torch.empty_like(square_O)
