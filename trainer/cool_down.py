"""A run that pauses is judged as if it ended there: after some more steps, in which its rate falls to zero.

A schedule that is still high makes high rates look worse than they end. The cool-down is a branch from what the
checkpoint of the pause holds. Of it the figures alone are kept: who goes on does so from the checkpoint.
"""

import time

from runfolder.cooling import COOLED, COOLED_LOSS, cool_down_steps
from trainer.evaluate import Evaluator
from trainer.progress import announce
from trainer.reported import is_reported
from trainer.run import Run
from trainer.step import Feed, apply_step

_EVAL = "eval_"


def judge_cooled(run: Run, step: int, micro_batches_of: Feed, evaluator: Evaluator) -> None:
    """Before a pause, cool down and judge, where the job says so; every rank calls it, and trains no more after it.

    The checkpoint of the step is on disk. Raises Stopped where there is no time left for that.
    """
    steps = cool_down_steps(run.job.evaluation.cool_down, step, run.batches.steps)
    can_branch = evaluator.batches is not None and not run.objective.generates  # what was written would be kept
    if not steps or not can_branch:
        return
    if not run.stops.pauses(step) or is_reported(run, step, COOLED_LOSS):
        return
    attempt = run.attempt
    announce(attempt, run.world, "cooling_down", step=step, steps=steps)
    began = time.time()
    for number in range(steps):
        attempt.note_progress()
        run.stops.leave_if_warned(step)
        factor = (steps - number) / steps
        apply_step(run, step + number + 1, micro_batches_of, factor)
    metrics, _ = evaluator.judge(run, step)
    if not run.world.leads:
        return
    cooled = {}
    for name, value in metrics.items():
        of_branch = COOLED + name.removeprefix(_EVAL)
        cooled[of_branch] = value
    now = time.time()
    attempt.append("metrics.jsonl", {"step": step, "time": now, **cooled})
    attempt.event("cooled_down", step=step, steps=steps, seconds=now - began)
    print(f"step {step}, cooled down for {steps}: eval_loss {cooled[COOLED_LOSS]:.4f}", flush=True)
