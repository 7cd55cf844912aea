"""The learning rate as a function of the step alone."""

import math

from runfolder.job import Job


def learning_rate(job: Job, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the job's schedule down to zero."""
    settings = job.train
    peak = job.lr
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay_steps = max(1, steps - warmup)
    done = (step - warmup) / decay_steps
    match settings.schedule:
        case "cosine":
            cosine = math.cos(math.pi * done)
            return peak * 0.5 * (1 + cosine)
        case "linear":
            return peak * (1 - done)
        case "constant":
            return peak
