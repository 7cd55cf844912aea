"""Whether a base computes the same where ranks share its rows: not every one mixes positions in attention alone."""

from typing import Any

import torch
import torch.distributed as dist

from trainer.document_leak import LEAK_ROUNDING
from trainer.objectives.score_head import revealed
from trainer.run import Run

PROBED = 8  # positions of each rank


def check_shared_rows(run: Run) -> None:
    """Raise ValueError where a base says something else of rows that ranks share; every rank calls it."""
    world = run.world
    group = world.sequence
    if group.size == 1:
        return
    model = run.model
    config = model.config.get_text_config()
    model.eval()
    with torch.no_grad(), revealed(model):
        moved = _moved(run, config.vocab_size)
    model.train()
    most = torch.tensor(moved, device=world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not most.item() <= LEAK_ROUNDING[run.dtype]:  # also where it is not a number
        raise ValueError(
            f"sharding.sequence: found {group.size} with a base of type {config.model_type}, which mixes the "
            "positions of a row elsewhere than in its attention; allowed: 1"
        )


def _moved(run: Run, vocabulary: int) -> float:
    """How far this rank's logits of a random row are from those of a rank that has all of it, over the largest."""
    group = run.world.sequence
    engine: Any = run.sharded.engine
    length = min(PROBED * group.size, run.job.data.seq_len)
    own = length // group.size
    length = own * group.size
    start = group.index * own
    generator = torch.Generator()
    generator.manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    positions = torch.arange(length)[None]
    if run.job.data.packing:
        positions = positions % (own + 1)  # a document goes on in the next part
    ids = ids.to(run.world.device)
    positions = positions.to(run.world.device)
    part = slice(start, start + own)
    whole = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
    shared = engine(
        input_ids=ids[:, part],
        position_ids=positions[:, part],
        whole_position_ids=positions,
        use_cache=False,
    ).logits
    difference = shared - whole[:, part]
    moved = difference.abs().max() / whole.abs().max()
    return float(moved)
