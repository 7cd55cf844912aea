"""A job's steps without DeepSpeed or hooks: one example at a time, AdamW, the mean over target tokens."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finished_runs import Curve
from torch import nn
from transformers import AutoModelForCausalLM

from runfolder.job import Job
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import tokenise
from trainer.schedule import learning_rate

Example = tuple[torch.Tensor, torch.Tensor, int]  # ids, labels, target tokens of the whole batch


def base(run_dir: Path, **loading: Any) -> Any:
    """The job's base, with the seed set as the trainer sets it before a method is attached."""
    job = load_job(run_dir)
    model = AutoModelForCausalLM.from_pretrained(job.base.model, dtype=torch.float32, **loading)
    torch.manual_seed(job.train.seed)
    return model


def adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over what is trained; `train` sets the learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)


def steps(run_dir: Path, cache: Path) -> Iterator[list[Example]]:
    """The examples of each step."""
    job = load_job(run_dir)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    batches = Batches.of(job, Examples.of_each(tokens))
    for k in range(batches.steps):
        step = []
        for i in batches.examples(k):
            document = tokens.document(int(i))
            ids = torch.tensor(document.ids, dtype=torch.long)
            step.append((ids, ids.masked_fill(~torch.tensor(document.target), -100), batches.batch(k).targets))
        yield step


def train(
    run_dir: Path,
    cache: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    mask: Callable[[int], torch.Tensor | None] = lambda length: None,  # noqa: ARG005
    rate: Callable[[int], float] | None = None,
    term: Callable[[], torch.Tensor] | None = None,
    before: Callable[[int], None] = lambda k: None,  # noqa: ARG005
    after: Callable[[int], None] = lambda k: None,  # noqa: ARG005
) -> Curve:
    """Train; steps are from 0.

    `mask` is the attention of a document, by its length; `rate` replaces the job's learning rate, `term` adds to the
    loss; `before` comes between backward and clipping, `after` after the optimizer's step.
    """
    job = load_job(run_dir)
    curve: Curve = []
    for k, examples in enumerate(steps(run_dir, cache)):
        total = 0.0
        for ids, labels, targets in examples:
            logits = model(input_ids=ids[None], attention_mask=mask(len(ids))).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        if term is not None:
            term().backward()
        before(k)
        norm = clipped_step(model, optimizer, job, rate(k) if rate else learning_rate(job, k, job.train.steps))
        after(k)
        optimizer.zero_grad()
        curve.append((total, norm))
    return curve


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job, lr: float) -> float:
    """The step of an optimizer with gradients that are clipped as the job says; gives their norm before that.

    clip_grad_norm_ sums squares in fp32, which alone is off by 1e-6; so the norm is taken in fp64.
    """
    graded = [p for p in model.parameters() if p.grad is not None]
    norm = torch.cat([p.grad.flatten() for p in graded]).double().norm()
    torch.nn.utils.clip_grads_with_norm_(graded, job.train.clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm.item()
