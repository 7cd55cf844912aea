"""Flash attention of documents as plain sums on a CPU, in the place of PyTorch's operations, which are for GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Within it, documents are attended to in fp32 on a CPU."""
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float32)  # in which documents are attended to
    with (
        patch.object(torch.ops.aten, "_flash_attention_forward", attention_of_documents),
        patch.object(torch.ops.aten, "_flash_attention_backward", slopes_of_documents),
    ):
        yield
    torch.set_autocast_dtype("cpu", before)


def attention_of_documents(
    query: Any, key: Any, value: Any, starts: Any, key_starts: Any, *_: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash attention computes, document by document: the last query sees all of its keys."""
    attended = torch.zeros_like(query)
    for q, k, share, weights in documents_of(query, key, starts, key_starts, options["scale"]):
        attended[q] = torch.einsum("hqk,khd->qhd", weights, value[k].repeat_interleave(share, 1))
    return attended, torch.zeros(query.shape[1], len(query))


def slopes_of_documents(
    slope: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any
) -> list[torch.Tensor]:
    """The gradients of the same, written out."""
    _, _, starts, key_starts, *_ = rest
    scale, slopes = options["scale"], [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for q, k, share, weights in documents_of(query, key, starts, key_starts, scale):
        wide_key, wide_value = key[k].repeat_interleave(share, 1), value[k].repeat_interleave(share, 1)
        of_weights = torch.einsum("qhd,khd->hqk", slope[q], wide_value)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        slopes[0][q] = scale * torch.einsum("hqk,khd->qhd", of_scores, wide_key)
        for number, wide in (
            (1, scale * torch.einsum("hqk,qhd->khd", of_scores, query[q])),
            (2, torch.einsum("hqk,qhd->khd", weights, slope[q])),
        ):
            slopes[number][k] = wide.unflatten(1, (-1, share)).sum(2)
    return slopes


def documents_of(query: Any, key: Any, starts: Any, key_starts: Any, scale: float) -> Any:
    """Of each document its queries, its keys, how many heads share a key, and the weights of its attention."""
    share = query.shape[1] // key.shape[1]
    for bounds, key_bounds in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        q, k = slice(*bounds), slice(*key_bounds)
        scores = scale * torch.einsum("qhd,khd->hqk", query[q], key[k].repeat_interleave(share, 1))
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        yield q, k, share, scores.masked_fill(~seen, -torch.inf).softmax(-1)
