"""PyTorch's flash attention of documents, forward and backward, whose gradients are added up in a fixed order.

So a run that is resumed goes on bit for bit. Each document's last queries are those of its last keys.
Shapes: N tokens, M keys, H heads, D head size, S documents + 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic


@contextmanager
def fixed_order() -> Iterator[None]:
    """Within it, operations that have a deterministic form use it."""
    settings: Any = deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


def flash_attention(
    query_NHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention [N, H, D] within documents of at most `longest` tokens, and the logarithms of its sums."""
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


def flash_attention_backward(
    slope_NHD: Tensor,
    query_NHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    attended_NHD: Tensor,
    sums: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each added up in a fixed order."""
    without_dropout = torch.zeros(2, dtype=torch.uint64, device=query_NHD.device)
    unused = torch.empty(0, device=query_NHD.device)
    with fixed_order():
        query_slope, key_slope, value_slope = torch.ops.aten._flash_attention_backward(
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
    return query_slope, key_slope, value_slope


def like_attention(query_NHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Tensors like those that attention gives."""
    tokens, heads, _size = query_NHD.shape
    sums_HN = query_NHD.new_empty(heads, tokens, dtype=torch.float32)
    attended_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
    return attended_NHD, sums_HN


def like_gradients(
    _slope: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the gradients of query, key and value."""
    gradients = []
    for tensor in (query, key, value):
        gradients.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    of_query, of_key, of_value = gradients
    return of_query, of_key, of_value


def keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    """Save the inputs of an attention, whose last two are `longest` and `scale`, and what it gave."""
    *tensors, longest, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.longest = longest
    ctx.scale = scale
