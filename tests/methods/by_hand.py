"""A job's steps without DeepSpeed or hooks: one example at a time, AdamW, the mean over target tokens."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from finished_runs import Curve
from torch import nn
from transformers import AutoModelForCausalLM

from trainer.attempt import load_job
from trainer.base import load_tokenizer
from trainer.loop import plan_batches
from trainer.schedule import learning_rate
from trainer.tokens import tokenise

Example = tuple[torch.Tensor, torch.Tensor, int]  # ids, labels, target tokens of the whole batch


def base(run_dir: Path) -> Any:
    """The job's base, with the seed set as the trainer sets it before a method is attached."""
    job = load_job(run_dir)
    model = AutoModelForCausalLM.from_pretrained(job.base.model, dtype=torch.float32)
    torch.manual_seed(job.train.seed)
    return model


def steps(run_dir: Path, cache: Path) -> Iterator[list[Example]]:
    """The examples of each step."""
    job = load_job(run_dir)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), job.data.seq_len, cache)
    batches = plan_batches(job, tokens)
    for k in range(batches.steps):
        step = []
        for i in batches.examples(k):
            example = tokens.example(int(i))
            ids = torch.tensor(example.ids, dtype=torch.long)
            step.append((ids, ids.masked_fill(~torch.tensor(example.target), -100), batches.target_tokens(k)))
        yield step


def train(
    run_dir: Path,
    cache: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rate: Callable[[int], float] | None = None,
    term: Callable[[], torch.Tensor] | None = None,
    before: Callable[[int], None] = lambda k: None,  # noqa: ARG005
    after: Callable[[int], None] = lambda k: None,  # noqa: ARG005
) -> Curve:
    """Train; `before` comes between backward and clipping, `after` after the optimizer's step. Steps are from 0."""
    job = load_job(run_dir)
    curve: Curve = []
    for k, examples in enumerate(steps(run_dir, cache)):
        total = 0.0
        for ids, labels, targets in examples:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        if term is not None:
            term().backward()
        before(k)
        graded = [p for p in model.parameters() if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in graded]).double().norm()
        torch.nn.utils.clip_grads_with_norm_(graded, job.train.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(k) if rate else learning_rate(job, k, job.train.steps)
        optimizer.step()
        after(k)
        optimizer.zero_grad()
        curve.append((total, norm.item()))
    return curve
