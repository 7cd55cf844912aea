"""A controller that closes a cancelled run where no allocation has one: that takes neither workers nor Ray."""

import os
import subprocess
from pathlib import Path

from clusters.base import Unreachable
from clusters.controllers import COLLECTED, REQUEUED, controller_command
from runfolder.snapshot import has_ended

_CLOSE_S = 60.0


def close_cancelled(run_dir: Path) -> None:
    """Have a controller close a run here; raises Unreachable where the run has no result then.

    A controller that stays to deliver what MLflow does not take now is ended: any later command delivers the rest.
    """
    environment = os.environ | COLLECTED | REQUEUED  # a walltime was that of a job, not the end of the run
    environment.pop("RAY_ADDRESS", None)
    command = controller_command(str(run_dir))
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, errors="replace", timeout=_CLOSE_S, check=False
        )
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        why = lines[-1]
    except subprocess.TimeoutExpired:
        why = f"it took more than {_CLOSE_S:.0f} s"
    if not has_ended(run_dir):
        raise Unreachable(f"the cancel is noted, but the controller did not close {run_dir.name}: {why}; repeat this")
