"""Jobs that SLURM holds since a node could not start them: each is let go on, but not for ever.

A node whose prolog fails is drained with each try, and so would be all nodes of a site, one after the other.
"""

import time
from contextlib import suppress
from pathlib import Path

from clusters.base import Unreachable
from clusters.slurm_commands import call_slurm

_MOST_RELEASES = 2  # of a job
_APART_S = 60.0  # seconds between two
_RELEASE_S = 10.0  # for scontrol to answer


def let_go_on(job_id: str, note: Path) -> bool:
    """Have SLURM release a job, unless it was just asked; False where that was done as often as may help.

    `note` has the time of each release, in seconds since 1970.
    """
    times = note.read_text().split() if note.exists() else []
    if times and time.time() - float(times[-1]) < _APART_S:
        return True
    if len(times) >= _MOST_RELEASES:
        return False
    try:
        with note.open("a") as stream:
            stream.write(f"{time.time()}\n")
    except OSError:  # what cannot be counted could be done for ever
        return False
    with suppress(Unreachable):
        call_slurm(["scontrol", "release", job_id], timeout_s=_RELEASE_S)
    return True
