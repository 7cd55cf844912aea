"""The evaluation with the lowest held-out loss: what is kept for it, and when training has gone on for long enough.

All of it is read from the rows that were reported, so an attempt that goes on knows what those before it saw. The
untuned base, which is judged before the first step, is no candidate: there is no checkpoint of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
import torch.distributed as dist

from runfolder.appended import read_lines
from runfolder.chain import attempts
from trainer.checkpoint.lineage import lineage
from trainer.checkpoint.reading import CheckpointReader
from trainer.omissions import note_omission
from trainer.run import Run

NEVER = -1  # the step of no evaluation

LossesByStep = Mapping[int, float]


@dataclass(frozen=True)
class BestSoFar:
    """The step whose evaluation had the lowest loss (NEVER before the first), and how many came after it."""

    step: int = NEVER
    since: int = 0

    @classmethod
    def of(cls, losses: LossesByStep) -> "BestSoFar":
        """The best of evaluations by their step; the earliest of those that are equal."""
        best = NEVER
        lowest = inf
        since = 0
        for step in sorted(losses):
            loss = losses[step]
            if loss < lowest:
                best = step
                lowest = loss
                since = 0
            else:
                since += 1
        return cls(best, since)


def best_so_far(run: Run, step: int) -> BestSoFar:
    """The best evaluation up to a step, as rank 0 reads it; every rank calls it, where the job asks for it."""
    best = BestSoFar()
    if not run.job.evaluation.goes_by_loss:
        return best
    if run.world.leads:
        best = BestSoFar.of(_reported_losses(run, step))
    said = torch.tensor([best.step, best.since], device=run.world.device)
    dist.broadcast(said, 0)
    found, since = said.tolist()
    return BestSoFar(found, since)


def is_over(run: Run, best: BestSoFar) -> bool:
    """Whether the held-out loss has not become lower for as many evaluations as the job waits."""
    patience = run.job.evaluation.stop_after
    if patience is None:
        return False
    return best.since >= patience


def end_by_loss(run: Run, step: int) -> None:
    """After the last step, give the model the weights of the best evaluation, where the job keeps those."""
    if run.world.leads and step < run.batches.steps:
        run.attempt.event("ended_early", step=step)
    if run.job.evaluation.keep != "best":
        return
    best = best_so_far(run, step).step
    if best in (NEVER, step):
        return
    for start, folder in lineage(run.attempt.run_dir, fresh=True):
        if start.step == best:
            reader = CheckpointReader(folder)
            with torch.no_grad():
                reader.load_weights(run.model, run.method)
            if run.world.leads:
                run.attempt.event("best_taken", step=best)
            return
    if run.world.leads:
        note_omission(
            run.attempt, "the best checkpoint", f"that of step {best} is gone; the output is of step {step}"
        )


def _reported_losses(run: Run, step: int) -> LossesByStep:
    """The losses of evaluations after steps up to this one; the first report of each counts."""
    losses: dict[int, float] = {}
    for attempt in attempts(run.attempt.run_dir):
        for row in read_lines(attempt, "metrics.jsonl"):
            of_step = row["step"]
            if "eval_loss" in row and 0 < of_step <= step:
                losses.setdefault(of_step, row["eval_loss"])
    return losses
