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
    share = run.job.evaluation.cool_down
    steps = cool_down_steps(share, step, run.batches.steps)
    if not steps or evaluator.batches is None:
        return
    if run.objective.generates:
        return  # what it wrote on the branch would be kept
    if not run.stops.pauses(step):
        return
    if is_reported(run, step, COOLED_LOSS):
        return
    attempt = run.attempt
    world = run.world
    announce(attempt, world, "cooling_down", step=step, steps=steps)
    began = time.time()
    first = step + 1
    for number in range(steps):
        attempt.note_progress()
        run.stops.leave_if_warned(step)
        left = steps - number
        factor = left / steps
        apply_step(run, first + number, micro_batches_of, factor)
    metrics, _ = evaluator.judge(run, step)
    if not world.leads:
        return
    cooled = {}
    for name, value in metrics.items():
        short = name.removeprefix(_EVAL)
        cooled[COOLED + short] = value
    now = time.time()
    row = {"step": step, "time": now, **cooled}
    attempt.append("metrics.jsonl", row)
    seconds = now - began
    attempt.event("cooled_down", step=step, steps=steps, seconds=seconds)
    loss = cooled[COOLED_LOSS]
    print(f"step {step}, cooled down for {steps}: eval_loss {loss:.4f}", flush=True)
