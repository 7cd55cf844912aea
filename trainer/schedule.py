"""The learning rate as a function of the step alone."""

import math

from runfolder.job import Job


def learning_rate(job: Job, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the job's schedule down to zero."""
    warmup = round(job.train.warmup * steps)
    if step < warmup:
        return job.lr * (step + 1) / warmup
    decay_steps = max(1, steps - warmup)
    done = (step - warmup) / decay_steps
    match job.train.schedule:
        case "cosine":
            cosine = math.cos(math.pi * done)
            return job.lr * 0.5 * (1 + cosine)
        case "linear":
            return job.lr * (1 - done)
        case "constant":
            return job.lr
