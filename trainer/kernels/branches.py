"""Attention where two answers share a prompt: the second one's queries see the keys of the prompt and their own.

Documents lie one behind another in the flattened rows, as in `documents.py`, and a second answer is one that has no
prompt of its own. Its keys are gathered: the prompt's, then its own; so flash attention sees documents whose last
queries are there. A key is gathered at most twice, and a sum of two is the same in any order: so gradients are added
up bit for bit alike.
Shapes: N tokens, M gathered keys, H heads, D head size, S documents + 1.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.flash import (
    flash_attention,
    flash_attention_backward,
    keep_for_backward,
    like_attention,
    like_gradients,
)


@torch.library.custom_op("fleetune::branch_attention", mutates_args=())
def branch_attention(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    key_places_M: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention [N, H, D] of documents to their gathered keys, and the logarithms of its sums."""
    key_MHD = key_NHD[key_places_M]
    value_MHD = value_NHD[key_places_M]
    return flash_attention(query_NHD, key_MHD, value_MHD, starts_S, key_starts_S, longest, scale)


branch_attention.register_fake(like_attention)


@torch.library.custom_op("fleetune::branch_attention_backward", mutates_args=())
def branch_attention_backward(
    slope_NHD: Tensor,
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    key_places_M: Tensor,
    attended_NHD: Tensor,
    sums: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    key_MHD = key_NHD[key_places_M]
    value_MHD = value_NHD[key_places_M]
    query_slope, key_slope_MHD, value_slope_MHD = flash_attention_backward(
        slope_NHD, query_NHD, key_MHD, value_MHD, attended_NHD, sums, starts_S, key_starts_S, longest, scale
    )
    key_slope = torch.zeros_like(key_NHD, memory_format=torch.contiguous_format)
    key_slope.index_add_(0, key_places_M, key_slope_MHD)
    value_slope = torch.zeros_like(value_NHD, memory_format=torch.contiguous_format)
    value_slope.index_add_(0, key_places_M, value_slope_MHD)
    return query_slope, key_slope, value_slope


branch_attention_backward.register_fake(like_gradients)


def _branches_backward(ctx: Any, slope_NHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = branch_attention_backward(slope_NHD, *saved, ctx.longest, ctx.scale)
    without_gradient = (None,) * 5
    return (*gradients, *without_gradient)


branch_attention.register_autograd(_branches_backward, setup_context=keep_for_backward)
