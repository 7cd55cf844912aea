"""Embeddings for token ids that a tokenizer has and its base does not."""

from typing import Any

import torch
from torch import nn

from trainer.zero.gather import gathered


def vocabulary(config: Any) -> int:
    """How many token ids a model of this config has an embedding for."""
    return int(config.get_text_config().vocab_size)


def add_missing(model: Any, tokenizer: Any) -> None:
    """Give every id of the tokenizer an embedding, and a row of the head.

    A new row is the mean of the old ones, the same on every rank and in every layout. Every rank calls it.
    """
    inputs = model.get_input_embeddings()
    head = model.get_output_embeddings()
    ids = tokenizer.get_vocab().values()
    rows = 1 + max(ids)
    if rows <= inputs.num_embeddings:
        return
    tied = head is not None and head.weight is inputs.weight
    inputs.weight = _lengthened(inputs.weight, rows)
    inputs.num_embeddings = rows
    if head is not None:
        if tied:
            head.weight = inputs.weight
        else:
            head.weight = _lengthened(head.weight, rows)
        head.out_features = rows
        if getattr(head, "bias", None) is not None:
            head.bias = _lengthened(head.bias, rows)
    config = model.config.get_text_config()
    config.vocab_size = rows
    model.vocab_size = rows


def _lengthened(weight: nn.Parameter, rows: int) -> nn.Parameter:
    """A weight [V, ...] with so many rows, those behind V being the mean of the others; whole on every rank."""
    with torch.no_grad(), gathered([weight]):
        mean = weight.double().mean(0, keepdim=True)
        row = mean.to(weight.dtype)
        missing = rows - len(weight)
        width = row.shape[1:]
        added = row.expand(missing, *width)
        longer = torch.cat([weight, added])
        trained = weight.requires_grad
        return nn.Parameter(longer, trained)
