"""What the model of a run writes after prompts."""

from collections.abc import Callable

import torch

from trainer.end_tokens import until_end
from trainer.greedy import TokenRows, greedily, left_padded
from trainer.run import Run

StopCriterion = Callable[..., torch.Tensor]  # from ids and scores to whether each row ends


def write_greedily(run: Run, rows: TokenRows, new_tokens: int, stop: StopCriterion | None = None) -> list[str]:
    """What the model writes after each row of ids, greedily, without the token that ends it.

    `stop` says after each token whether rows are to end there.
    """
    run.attempt.note_progress()
    tokenizer = run.tokenizer
    pad = tokenizer.pad_token_id
    ids, mask = left_padded(rows, pad)
    ends = run.ends
    device = run.world.device
    with greedily(run.model, new_tokens, ends, pad):
        out = run.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            use_cache=True,
            synced_gpus=run.sharded.stage == 3,
            stopping_criteria=[stop] if stop else None,
        )
    width = ids.shape[1]
    continued = out[:, width:]
    continuations = continued.tolist()
    answers = [until_end(row, ends) for row in continuations]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts
