"""Greedy generation for rows of one batch: padding in front, and the likeliest token each time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from methods.parts.peft_adapter import base_under

TokenRows = list[list[int]]  # token ids


def left_padded(rows: TokenRows, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one [rows, longest] with padding in front, and the mask of what is no padding."""
    longest = max(map(len, rows))
    ids = []
    mask = []
    for row in rows:
        length = len(row)
        padding = longest - length
        row_mask = [0] * padding + [1] * length
        ids.append([pad] * padding + row)
        mask.append(row_mask)
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def greedily(model: Any, new_tokens: int, ends: Sequence[int], pad: int) -> Iterator[None]:
    """Within it, a model generates the likeliest token each time, until one of `ends`.

    What the base's own generation config asks for beside is put aside: a penalty, say, is no greedy choice.
    """
    from transformers import GenerationConfig

    base = base_under(model)
    of_base = base.generation_config
    base.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        base.generation_config = of_base
