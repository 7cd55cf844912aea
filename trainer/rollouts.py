"""What the model wrote in a step, kept in the run folder: attempts/N/rollouts/step-S.safetensors.

It is there whole or not at all, and before the update of its step. A later attempt that comes to the step learns from
what is there, so it reports the same loss, though a generating engine need not write the same twice.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file

from runfolder.chain import Attempt, attempts
from runfolder.files import sync_folder
from runfolder.samples import SAMPLES_FILE
from trainer.data.examples import GlobalBatch
from trainer.objectives.base import Arrays, TensorsByName
from trainer.reward_journal import forget_rewards
from trainer.run import Run

PassesOf = Callable[[GlobalBatch], Iterable[TensorsByName]]  # from a global batch to this rank's micro-batches


class RolloutLost(RuntimeError):
    """What was written for a step is not recorded any more, and the policy that wrote it has moved since."""


def rolled_out(run: Run, step: int, passes_of: PassesOf) -> GlobalBatch:
    """The batch that the model has written for a step: as it was recorded, or now; every rank calls it.

    Raises RolloutLost where a step learns from what was written for one before it, which is not there.
    """
    world = run.world
    first = run.objective.rollout_step(step)
    batch = run.batches.batch(first - 1)
    known: list[Arrays | None] = [None]
    if world.leads:
        known = [recorded_rollout(run.attempt, first)]
    dist.broadcast_object_list(known, device=world.device)
    rollout = known[0]
    if rollout is None:
        if first != step:
            raise RolloutLost(f"step {step} learns from what was written for step {first}, which is not recorded")
        rollout = written(run, step, batch, passes_of)
    if world.leads:  # the others cannot finish the update, a collective, before it is on disk
        write_rollout(run.attempt, first, rollout)
        forget_rewards(run.attempt, first)
        if first == step:
            keep_samples(run, step, rollout)
    return run.objective.rolled_out(batch, rollout)


def written(run: Run, step: int, batch: GlobalBatch, passes_of: PassesOf) -> Arrays:
    """What the model writes now for the examples of a batch."""
    model = run.model
    objective = run.objective
    model.eval()
    with torch.no_grad():
        rollout = objective.rollout(model, batch, step)

        def passes() -> Iterator[TensorsByName]:
            """This rank's micro-batches of what was written, where they are asked for."""
            as_batch = objective.rolled_out(batch, rollout)
            yield from passes_of(as_batch)

        objective.complete_rollout(model, rollout, passes())
    model.train()
    return rollout


def keep_samples(run: Run, step: int, rollout: Arrays) -> None:
    """Append what people are shown of a rollout to samples.jsonl of the attempt."""
    now = time.time()
    for sample in run.objective.samples(rollout):
        run.attempt.append(SAMPLES_FILE, {"step": step, "time": now, **sample})


def recorded_rollout(attempt: Attempt, step: int) -> Arrays | None:
    """What this attempt, or the newest one before it that came so far, has recorded of a step."""
    oldest_first = attempts(attempt.run_dir)
    newest_first = reversed(oldest_first)
    for other in newest_first:
        path = _rollout_path(other, step)
        if other.number <= attempt.number and path.exists():
            arrays: Arrays = load_file(path)
            return arrays
    return None


def write_rollout(attempt: Attempt, step: int, rollout: Arrays) -> None:
    """Write a step's rollout, whole or not at all."""
    path = _rollout_path(attempt, step)
    folder = path.parent
    folder.mkdir(exist_ok=True)
    unique = uuid.uuid4().hex
    draft = path.with_name(f".{path.name}.{unique}")
    save_file(rollout, draft)
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(folder)


def _rollout_path(attempt: Attempt, step: int) -> Path:
    """Where an attempt's rollout of a step lies."""
    folder = attempt.folder / "rollouts"
    return folder / f"step-{step}.safetensors"
