"""Whether two answers that share a prompt in a row see each other: not every base takes a mask against that."""

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
from trainer.objectives.base import HostArrays
from trainer.objectives.labels import label_arrays, logits
from trainer.objectives.score_head import revealed
from trainer.run import Run
from trainer.step import with_starts

# Norm of a difference over that of the values: what rounding may do.
MOVED = {torch.float32: 1e-4, torch.bfloat16: 0.1}
COMPARED_WEIGHTS = 8
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
    in_one_row = run.objective.kernels.in_one_row
    model.eval()
    with torch.no_grad(), revealed(model):
        moved = branch_gap(engine, config.vocab_size, device, in_one_row)
    model.train()
    holds = moved <= MOVED[run.dtype]
    if not holds:  # also where it is not a number
        _refuse_base(config.model_type, "in which two answers behind one prompt see each other")


def _refuse_base(kind: str, reason: str) -> NoReturn:
    found = f"true with a base of type {kind}, {reason}"
    raise ValueError(f"objective.share_prompts: found {found}; allowed: false")


def problem_of_branches(
    model: nn.Module, vocabulary: int, device: torch.device, in_one_row: bool, rounding: float
) -> str | None:
    """What is wrong with answers that share a prompt on the fast path; None where nothing is."""
    try:
        gap = branch_gap(model, vocabulary, device, in_one_row)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or a base of another kind, raises
        kind = type(error)
        return f"shared prompts: {kind.__name__}: {error}"
    if gap <= rounding:
        return None
    return f"shared prompts: answers differ by {gap:.1e}"


def branch_gap(model: nn.Module, vocabulary: int, device: torch.device, in_one_row: bool) -> float:
    """How far the logits of two answers to a prompt move when they share it in one row, relative to their norm.

    Where gradients are recorded, how far those of a few trained weights move too, if that is farther.
    """
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
    apart = label_arrays([[0], [1]], tokens, 0)
    together = label_arrays([[0, 1]], tokens, 0, shared)
    gaps = []
    found = []
    for arrays in (apart, together):
        completed: HostArrays = arrays
        if in_one_row:
            completed = with_starts(arrays)
        seen = _logits_and_slopes(model, completed, device)
        found.append(seen)
    for alone, shares in zip(*found, strict=True):
        difference = alone - shares
        gap = difference.norm() / alone.norm()
        gaps.append(float(gap))
    return max(gaps)


def _logits_and_slopes(model: nn.Module, arrays: HostArrays, device: torch.device) -> list[torch.Tensor]:
    """The logits of a micro-batch's labels, and where they are recorded the gradients of a sum of them."""
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array)
        batch[name] = tensor.to(device)
    found = logits(model, batch).float()
    seen = [found.detach()]
    if not torch.is_grad_enabled():
        return seen
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = found.square().sum()
    gradients = torch.autograd.grad(total, trained[:COMPARED_WEIGHTS], allow_unused=True)
    for gradient in gradients:
        if gradient is not None and gradient.any():
            seen.append(gradient.float())
    return seen


def _random_ids(vocabulary: int, length: int, generator: torch.Generator) -> Indices:
    """So many random token ids."""
    size = (length,)
    ids = torch.randint(vocabulary, size, generator=generator)
    return ids.numpy()
