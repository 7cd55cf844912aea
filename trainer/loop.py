"""The training loop of one worker."""

from pathlib import Path

import torch.distributed as dist

from runfolder.chain import Attempt
from serving.garbage import leave_to_no_collection
from trainer import speed
from trainer.best import best_so_far, end_by_loss, is_over
from trainer.calibration import calibrate_evaluation, calibrate_training
from trainer.checkpoint.saving import CheckpointWriter
from trainer.cool_down import judge_cooled
from trainer.evaluate import Evaluator
from trainer.export import export
from trainer.meter import Meter, SaveRequest
from trainer.prepare import prepare_run
from trainer.reference import know_reference
from trainer.reported import is_reported
from trainer.run import Run
from trainer.step import feed, take_step
from trainer.stop import Stopped

FORECAST_S = 60.0  # that a short run waits at its end for what was foretold of it


def train(run_dir: Path, attempt: int) -> bool:
    """Do this worker's part of an attempt that is claimed: from its start checkpoint to attempts/N/output.

    False where it was asked to stop before, and has saved. Every worker of the group calls it. Any exception is the
    caller's to judge.
    """
    claimed = Attempt(run_dir, attempt)
    try:
        run, first = prepare_run(claimed)
        foretelling = calibrate_training(run, first)
        know_reference(run, run.examples, run.batches.all_examples())
        settings = run.job.checkpoint
        saves = CheckpointWriter(run.attempt, run.world, settings.every, settings.keep)
        evaluator = Evaluator.create(run)
        calibrate_evaluation(run, first, evaluator)
        leave_to_no_collection()
        last = take_steps(run, first, saves, evaluator)
        end_by_loss(run, last)
        export(run)
        if foretelling:
            foretelling.join(FORECAST_S)
    except Stopped as stopped:
        if dist.get_rank() == 0:
            claimed.event("stopped", step=stopped.step)
        return False
    return True


def take_steps(run: Run, first: int, saves: CheckpointWriter, evaluator: Evaluator) -> int:
    """Take the steps after `first`, evaluate and save between them, until all is on disk; gives the last of them.

    That is an earlier one than the job's where the held-out loss says so. Raises Stopped, with as much on disk, where
    the run is to stop before its end.
    """
    last_step = run.batches.steps
    every = run.job.evaluation.every
    meter = create_meter(run)
    evaluate_first(run, first, evaluator)
    best = best_so_far(run, first)
    saves.best = best.step
    if is_over(run, best):
        return first
    meter.pause()
    micro_batches_of = feed(run, first)
    step = first
    for step in range(first + 1, last_step + 1):
        save_here = saves.overdue()
        stop_here = run.stops.wanted(step)
        request_here = SaveRequest(save_here, stop_here)
        requested = take_step(run, step, micro_batches_of, meter, request_here)
        is_last = step == last_step
        must_stop = requested.stop and not is_last
        must_save = is_last or requested.save or requested.stop or saves.due(step)
        if is_last or is_multiple(step, every):
            with meter.pausing() as asked:
                was_finished = evaluate_in_time(run, step, evaluator)
            asked_here = asked.stop and not is_last
            must_stop = must_stop or asked_here or not was_finished
            best = best_so_far(run, step)
            saves.best = best.step
            is_last = is_last or is_over(run, best)
            must_save = must_save or is_last or best.step == step
        if must_save or must_stop:
            with meter.pausing():
                saves.save(run.sharded, run.method, step)
        if must_stop:
            saves.wait()
            judge_cooled(run, step, micro_batches_of, evaluator)
            raise Stopped(step)
        if is_last:
            break
    saves.wait()
    return step


def create_meter(run: Run) -> Meter:
    """What measures the steps of a run on its devices."""
    world = run.world
    peak = speed.peak_flops(world.device, run.dtype)
    flops_per_token = speed.flops_per_token(run.model)
    steps = run.batches.steps
    return Meter(run.attempt, world, steps, flops_per_token, peak)


def evaluate_first(run: Run, first: int, evaluator: Evaluator) -> None:
    """Evaluate before the first step where the job says so, or where an earlier attempt had to leave it.

    Raises Stopped where no step is to be taken.
    """
    evaluation = run.job.evaluation
    unfinished = first < run.batches.steps
    if unfinished:
        if first and run.stops.pauses(first):
            judge_cooled(run, first, feed(run, first), evaluator)
        run.stops.leave_before_first()
    due = evaluation.before
    if first:
        due = not unfinished or is_multiple(first, evaluation.every)
        due = due and not is_reported(run, first)
    if due:
        evaluator.evaluate(run, first)


def evaluate_in_time(run: Run, step: int, evaluator: Evaluator) -> bool:
    """Evaluate after a step; False where there was no time left to finish that."""
    try:
        evaluator.evaluate(run, step)
    except Stopped:
        return False
    return True


def is_multiple(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps, if at all, is done after this one."""
    if every is None:
        return False
    return step % every == 0
