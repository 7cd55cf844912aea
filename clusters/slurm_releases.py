"""Jobs that go on by nothing of SLURM's own: who looks at the queue lets them go on.

Those that SLURM holds since a node could not start them, but not for ever: a node whose prolog fails is drained with
each try, and so would be all nodes of a site, one after the other. And those of several nodes that have lost the
first one before any other had a step of the run, and would have the others without a process until their walltime.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from clusters.base import Unreachable
from clusters.slurm_answers import QueuedJob
from clusters.slurm_commands import call_slurm

_MOST_RELEASES = 2  # of a job
_APART_S = 60.0  # seconds between two
_RELEASE_S = 10.0  # for scontrol to answer


def let_go_on(held: Iterable[QueuedJob], folder: Path) -> set[str]:
    """Have SLURM release jobs, all at once; gives the ids of those that it is asked for now, or was just asked for.

    A file of `folder` for each job has the times of its releases, in seconds since 1970.
    """
    released = set()
    due = []
    for job in held:
        note = folder / f"{job.name}.{job.id}.releases"
        times = note.read_text().split() if note.exists() else []
        if times and time.time() - float(times[-1]) < _APART_S:
            released.add(job.id)
        elif len(times) < _MOST_RELEASES and _is_noted(note):
            due.append(job.id)
    if due:
        with suppress(Unreachable):
            call_slurm(["scontrol", "release", ",".join(due)], timeout_s=_RELEASE_S)
    return released | {*due}


def send_back(lost: Iterable[QueuedJob]) -> set[str]:
    """Have SLURM start running jobs again, all at once; gives the ids of those that it is asked for."""
    ids = {job.id for job in lost}
    if ids:
        with suppress(Unreachable):
            call_slurm(["scontrol", "requeue", ",".join(sorted(ids))], timeout_s=_RELEASE_S)
    return ids


def _is_noted(note: Path) -> bool:
    """Write down a release of now; False where that fails: what cannot be counted could be done for ever."""
    try:
        with note.open("a") as stream:
            stream.write(f"{time.time()}\n")
    except OSError:
        return False
    return True
