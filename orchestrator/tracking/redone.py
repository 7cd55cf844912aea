"""Steps that were done again after a checkpoint: how far their values may be from the first ones."""

import math

from runfolder.evaluation_job import AnyJob
from runfolder.job import Job

FULL_PRECISION = 1e-6
COMPARED = ("loss", "lr", "grad_norm", "eval_loss", "eval_exact_match")


def relative_tolerance(job: AnyJob) -> float:
    """How much two values of one step may differ, as a part of them: more in half precision."""
    if not isinstance(job, Job):
        return FULL_PRECISION
    precision = job.train.precision
    on_gpus = bool(job.resources.gpus_per_node)
    is_half = precision == "bf16" or (precision == "auto" and on_gpus)
    return 5e-3 if is_half else FULL_PRECISION


def differ(first: float, now: float, tolerance: float) -> bool:
    """Whether two values of one step differ by more than a relative tolerance; not-a-number equals itself."""
    first_is_nan = math.isnan(first)
    now_is_nan = math.isnan(now)
    if first_is_nan or now_is_nan:
        return first_is_nan != now_is_nan
    return not math.isclose(first, now, rel_tol=tolerance)
