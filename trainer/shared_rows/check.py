"""Whether a base computes the same where ranks share its rows: not every one mixes positions in attention alone."""

import torch
import torch.distributed as dist

from trainer.document_leak import LEAK_ROUNDING
from trainer.objectives.score_head import revealed
from trainer.run import Run
from trainer.shared_rows.group import SequenceGroup

PROBED = 8  # positions of each rank


def check_shared_rows(run: Run) -> None:
    """Raise ValueError where a base says something else of rows that ranks share; every rank calls it."""
    group = run.world.sequence
    if group.size == 1:
        return
    data = run.job.data
    model = run.model
    config = model.config.get_text_config()
    own = min(PROBED, data.seq_len // group.size)
    device = run.world.device
    model.eval()
    with torch.no_grad(), revealed(model):
        gap = gap_of_sharing(run.sharded.engine, group, own, config.vocab_size, data.packing, device)
    model.train()
    if not gap <= LEAK_ROUNDING[run.dtype]:  # also where it is not a number
        raise ValueError(
            f"sharding.sequence: found {group.size} with a base of type {config.model_type}, which mixes the "
            "positions of a row elsewhere than in its attention; allowed: 1"
        )


def gap_of_sharing(
    model: torch.nn.Module,
    group: SequenceGroup,
    own: int,
    vocabulary: int,
    packing: bool,
    device: torch.device,
) -> float:
    """How far logits of a random row, `own` positions on each rank, are from those of a rank that has all of it.

    Relative to the largest, the most on any rank; a collective. With `packing`, the row has documents that go on in
    the next part.
    """
    length = own * group.size
    start = group.index * own
    generator = torch.Generator()
    generator.manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    positions = torch.arange(length)[None]
    if packing:
        positions = positions % (own + 1)
    ids = ids.to(device)
    positions = positions.to(device)
    part = slice(start, start + own)
    own_ids = ids[:, part]
    own_positions = positions[:, part]
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    shared = model(
        input_ids=own_ids,
        position_ids=own_positions,
        whole_position_ids=positions,
        use_cache=False,
    ).logits
    difference = shared - whole[:, part]
    largest = whole.abs().max()
    moved = difference.abs().max() / largest
    most = moved.float()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)
