"""Why an attempt must end that would go on by itself: its allocation, and its run's own walltime."""

import time
from typing import Literal

from clusters.controllers import end_of_allocation, is_requeued
from runfolder.resources import Resources


def why_told(before_s: float) -> tuple[Literal["walltime", "preemption"], str]:
    """Why a controller was told to end, and the reason in words.

    `before_s`: how long before the end of its allocation that is meant by it.
    """
    if time.time() > end_of_allocation() - before_s:
        return "walltime", "the walltime of the job that it is in is nearly over"
    return "preemption", "the controller was told to end"


def walltime_of_run(resources: Resources) -> int | None:
    """The seconds that a run may take from its opening on; None for no limit.

    Of a run that its scheduler starts again, the walltime is that of each allocation, of which the scheduler warns.
    """
    if is_requeued():
        return None
    return resources.walltime


def walltime_is_over(walltime: int) -> str:
    """The reason in words where a run has used up its walltime."""
    return f"resources.walltime of {walltime} s is over"
