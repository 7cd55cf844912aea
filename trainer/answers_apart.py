"""Whether two answers that share a prompt in a row see each other: not every base takes a mask against that."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from methods.options.base import window
from runfolder.objectives import shares_prompts
from trainer.data.collate import shared_by_pairs
from trainer.data.counts import Counts
from trainer.data.examples import Indices
from trainer.data.shards import join_examples
from trainer.data.tokens import Tokens
from trainer.objectives.labels import label_arrays, logits
from trainer.objectives.score_head import revealed
from trainer.run import Run

# Relative to the largest logit: what rounding may do.
MOVED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PROMPT_LENGTH, ANSWER_LENGTHS = 9, (5, 4)  # tokens


def check_answers_apart(run: Run) -> None:
    """Raise ValueError where a job shares prompts, and its base does not keep answers apart; every rank calls it."""
    if not shares_prompts(run.job.objective):
        return
    model = run.model
    config = model.config.get_text_config()
    described = config.to_dict()
    seen_back = window(described)
    longest = run.job.data.seq_len
    if seen_back is not None and seen_back < longest:
        _refuse_base(config.model_type, f"whose attention sees {seen_back} tokens back")
    engine = run.sharded.engine
    device = run.world.device
    model.eval()
    with revealed(model):
        moved = branch_gap(engine, config.vocab_size, device)
    model.train()
    holds = moved <= MOVED[run.dtype]
    if not holds:  # also where it is not a number
        _refuse_base(config.model_type, "in which two answers behind one prompt see each other")


def _refuse_base(kind: str, reason: str) -> NoReturn:
    raise ValueError(f"objective.share_prompts: found true with a base of type {kind}, {reason}; allowed: false")


def branch_gap(model: nn.Module, vocabulary: int, device: torch.device) -> float:
    """How far the logits of two answers to a prompt move when they share it in one row, relative to the largest."""
    generator = torch.Generator()
    generator.manual_seed(0)
    prompt = _random_ids(vocabulary, PROMPT_LENGTH, generator)
    documents = []
    for length in ANSWER_LENGTHS:
        answer = _random_ids(vocabulary, length, generator)
        ids = np.concatenate([prompt, answer])
        count = len(ids)
        places = np.arange(count)
        is_label = places >= PROMPT_LENGTH
        documents.append((ids, is_label))
    rows = [1, 1]
    shard = join_examples(documents, rows, Counts())
    tokens = Tokens([shard])
    shared = shared_by_pairs(tokens)
    alone = [[0], [1]]
    pair = [[0, 1]]
    apart = _logits_of(model, tokens, alone, None, device)
    together = _logits_of(model, tokens, pair, shared, device)
    difference = apart - together
    moved = difference.abs().max()
    largest = apart.abs().max()
    gap = moved / largest
    return float(gap)


def _random_ids(vocabulary: int, length: int, generator: torch.Generator) -> Indices:
    """So many random token ids."""
    size = (length,)
    ids = torch.randint(vocabulary, size, generator=generator)
    return ids.numpy()


def _logits_of(
    model: nn.Module,
    tokens: Tokens,
    rows: Sequence[Sequence[int]],
    shared: Indices | None,
    device: torch.device,
) -> torch.Tensor:
    """The logits [N, V] of the labels of some rows."""
    arrays = label_arrays(rows, tokens, 0, shared)
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        batch[name] = tensor.to(device)
    with torch.no_grad():
        return logits(model, batch)
