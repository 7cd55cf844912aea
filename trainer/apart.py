"""Whether the documents of a packed row see each other: not every base's attention looks for them in position_ids."""

import torch
from torch import nn

from trainer.run import Run

# Of logits, relative to the largest. What shows of another document is some percent, even with random weights.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FIRST, SECOND = 48, 2  # tokens of the document that changes, at the most, and of the one behind it


def check(run: Run) -> None:
    """Raise ValueError where a job packs and its base does not keep documents apart; every rank calls it."""
    if not run.job.data.packing:
        return
    run.model.eval()
    first = min(FIRST, run.job.data.seq_len)  # the base may know no more positions
    vocabulary = run.model.config.get_text_config().vocab_size  # a tokenizer may have more
    found = leak(run.shards.engine, first, vocabulary, run.world.device)
    run.model.train()
    if found > ROUNDING[run.dtype]:
        kind = run.model.config.model_type
        raise ValueError(f"data.packing: documents in a row see each other in a base of type {kind}; allowed: false")


def leak(model: nn.Module, first: int, vocabulary: int, device: torch.device) -> float:
    """How far a document's logits move when the `first` tokens before it change, relative to the largest of them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (length,), generator=generator).to(device)

    position_ids = torch.cat([torch.arange(first), torch.arange(SECOND)]).to(device)[None]
    second = drawn(SECOND)
    with torch.no_grad():
        rows = (torch.cat([drawn(first), second])[None] for _ in range(2))
        one, other = (model(input_ids=row, position_ids=position_ids, use_cache=False).logits[0] for row in rows)
    moved = (one[-SECOND:] - other[-SECOND:]).abs().max()
    return float(moved / one[-SECOND:].abs().max())
