"""Whether the documents of a packed row see each other: not every base's attention looks for them in position_ids."""

import torch
from torch import nn

from trainer.answers_apart import check_answers_apart
from trainer.objectives.score_head import revealed
from trainer.run import Run

# Relative to the largest logit. A leak moves logits by some percent, even with random weights; rounding by less.
LEAK_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FIRST, SECOND = 48, 2  # tokens of the document that changes, at the most, and of the one behind it


def check_documents_apart(run: Run) -> None:
    """Raise ValueError where a job packs and its base does not keep documents apart; every rank calls it.

    The same for two answers that share a prompt in a row.
    """
    check_answers_apart(run)
    data = run.job.data
    if not data.packing:
        return
    model = run.model
    config = model.config
    model.eval()
    first = min(FIRST, data.seq_len)  # the base may know no more positions
    vocabulary = config.get_text_config().vocab_size  # a tokenizer may have more
    engine = run.sharded.engine
    with revealed(model):
        moved = leak(engine, first, vocabulary, run.world.device)
    model.train()
    if moved > LEAK_ROUNDING[run.dtype]:
        kind = config.model_type
        raise ValueError(f"data.packing: documents in a row see each other in a base of type {kind}; allowed: false")


def leak(model: nn.Module, first: int, vocabulary: int, device: torch.device) -> float:
    """How far a document's logits move when the `first` tokens before it change, relative to the largest of them."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        size = (length,)
        ids = torch.randint(vocabulary, size, generator=generator)
        return ids.to(device)

    second = draw(SECOND)
    positions = [*range(first), *range(SECOND)]
    position_ids = torch.tensor([positions], device=device)

    def logits_behind(before: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([before, second])
        row = ids[None]
        out = model(input_ids=row, position_ids=position_ids, use_cache=False)
        logits: torch.Tensor = out.logits[0]
        return logits[-SECOND:]

    with torch.no_grad():
        logits = logits_behind(draw(first))
        other_logits = logits_behind(draw(first))
    difference = logits - other_logits
    moved = difference.abs().max()
    largest = logits.abs().max()
    return float(moved / largest)
