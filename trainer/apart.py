"""Whether the documents of a packed row see each other: not every base's attention looks for them in position_ids.

Shapes: T tokens of a document, V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import nn

from trainer.run import Run

# Relative to the largest logit. A leak moves logits by some percent, even with random weights; rounding by less.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FIRST, SECOND = 48, 2  # tokens of the document that changes, at the most, and of the one behind it


def check(run: Run) -> None:
    """Raise ValueError where a job packs and its base does not keep documents apart; every rank calls it."""
    if not run.job.data.packing:
        return
    run.model.eval()
    first = min(FIRST, run.job.data.seq_len)  # the base may know no more positions
    vocabulary = run.model.config.get_text_config().vocab_size  # a tokenizer may have more
    moved = leak(run.shards.engine, first, vocabulary, run.world.device)
    run.model.train()
    if moved > ROUNDING[run.dtype]:
        kind = run.model.config.model_type
        raise ValueError(f"data.packing: documents in a row see each other in a base of type {kind}; allowed: false")


def leak(model: nn.Module, first: int, vocabulary: int, device: torch.device) -> float:
    """How far a document's logits move when the `first` tokens before it change, relative to the largest of them."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        ids = torch.randint(vocabulary, (length,), generator=generator)
        return ids.to(device)

    second = draw(SECOND)
    with torch.no_grad():
        logits = _logits_behind(model, draw(first), second)
        other_logits = _logits_behind(model, draw(first), second)
    moved = (logits - other_logits).abs().max()
    largest = logits.abs().max()
    return float(moved / largest)


def _logits_behind(model: Any, first_T: torch.Tensor, second_T: torch.Tensor) -> torch.Tensor:
    """The logits [T, V] of the second of two documents in one row, whose positions start at 0 in each."""
    row = torch.cat([first_T, second_T])
    first_positions = torch.arange(len(first_T))
    second_positions = torch.arange(len(second_T))
    positions = torch.cat([first_positions, second_positions])
    position_ids = positions.to(row.device)
    out = model(input_ids=row[None], position_ids=position_ids[None], use_cache=False)
    logits: torch.Tensor = out.logits[0]
    return logits[-len(second_T) :]
