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

from trainer.kernels.fixed_order import fixed_order


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
    attended, sums, *_ = torch.ops.aten._flash_attention_forward(
        query_NHD,
        key_MHD,
        value_MHD,
        starts_S,
        key_starts_S,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
    )
    return attended, sums


@branch_attention.register_fake
def _attended_shape(
    query_NHD: Tensor,
    key_NHD: Tensor,  # noqa: ARG001
    value_NHD: Tensor,  # noqa: ARG001
    starts_S: Tensor,  # noqa: ARG001
    key_starts_S: Tensor,  # noqa: ARG001
    key_places_M: Tensor,  # noqa: ARG001
    longest: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query_NHD.shape
    sums_HN = query_NHD.new_empty(heads, tokens, dtype=torch.float32)
    return torch.empty_like(query_NHD, memory_format=torch.contiguous_format), sums_HN


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
    without_dropout = torch.zeros(2, dtype=torch.uint64, device=query_NHD.device)
    unused = torch.empty(0, device=query_NHD.device)
    key_MHD = key_NHD[key_places_M]
    value_MHD = value_NHD[key_places_M]
    with fixed_order():
        query_slope, key_slope_MHD, value_slope_MHD = torch.ops.aten._flash_attention_backward(
            slope_NHD.contiguous(),
            query_NHD,
            key_MHD,
            value_MHD,
            attended_NHD,
            sums,
            starts_S,
            key_starts_S,
            longest,
            longest,
            0.0,
            True,
            without_dropout,
            unused,
            scale=scale,
        )
    key_slope = torch.zeros_like(key_NHD, memory_format=torch.contiguous_format)
    key_slope.index_add_(0, key_places_M, key_slope_MHD)
    value_slope = torch.zeros_like(value_NHD, memory_format=torch.contiguous_format)
    value_slope.index_add_(0, key_places_M, value_slope_MHD)
    return query_slope, key_slope, value_slope


@branch_attention_backward.register_fake
def _shapes_of_slopes(
    slope_NHD: Tensor,  # noqa: ARG001
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    starts_S: Tensor,  # noqa: ARG001
    key_starts_S: Tensor,  # noqa: ARG001
    key_places_M: Tensor,  # noqa: ARG001
    attended_NHD: Tensor,  # noqa: ARG001
    sums: Tensor,  # noqa: ARG001
    longest: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = []
    for tensor in (query_NHD, key_NHD, value_NHD):
        gradients.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    query, key, value = gradients
    return query, key, value


def _save_branches(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, longest, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.longest = longest
    ctx.scale = scale


def _branches_backward(ctx: Any, slope_NHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = branch_attention_backward(slope_NHD, *ctx.saved_tensors, ctx.longest, ctx.scale)
    return (*gradients, None, None, None, None, None)


branch_attention.register_autograd(_branches_backward, setup_context=_save_branches)
