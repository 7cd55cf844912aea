"""The end of a run on which no controller is at work: that takes neither workers nor Ray."""

import os
import subprocess
import time
from pathlib import Path

from clusters.base import Unreachable
from clusters.controllers import COLLECTED, REQUEUED, controller_command
from runfolder.chain import close, last_attempt
from runfolder.delivered import note_delivered
from runfolder.files import Damaged
from runfolder.outcome import final_word
from runfolder.requests import cancel_requested, opened_at, why_cancelled
from runfolder.secrets import remove_secrets
from runfolder.snapshot import has_ended

_CLOSE_S = 60.0
_LONGEST_WHY = 300  # characters


def close_cancelled(run_dir: Path) -> None:
    """Have a controller close a run here; raises Unreachable where the run has no result then.

    A controller that stays to deliver what MLflow does not take now is ended: any later command delivers the rest. A
    run whose controllers cannot start is closed without one.
    """
    environment = os.environ | COLLECTED | REQUEUED  # a walltime was that of a job, not the end of the run
    environment.pop("RAY_ADDRESS", None)
    command = controller_command(str(run_dir))
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, errors="replace", timeout=_CLOSE_S, check=False
        )
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        why = lines[-1][:_LONGEST_WHY]
    except subprocess.TimeoutExpired:
        why = f"it took more than {_CLOSE_S:.0f} s"
    if has_ended(run_dir):
        return
    problem = f"the controller did not close {run_dir.name}: {why}"
    try:
        if cancel_requested(run_dir):
            end_without_controller(run_dir, "cancelled", "cancelled", f"{why_cancelled(run_dir)}; {problem}")
    except (Damaged, OSError) as error:
        problem += f"; {error}"
    if not has_ended(run_dir):
        raise Unreachable(f"the cancel is noted, but {problem}; repeat this")


def end_without_controller(run_dir: Path, state: str, verdict: str, why: str) -> None:
    """Close a run with its final word, as a controller would that could start; raises Damaged or OSError."""
    attempt = last_attempt(run_dir)
    close(run_dir, final_word(state, why, {"kind": verdict, "evidence": ""}, attempt.number))
    if attempt.number == 0:  # there is nothing to deliver
        note_delivered(run_dir, None)
        remove_secrets(run_dir)


def seconds_of_walltime_left(run_dir: Path, walltime: int | None) -> float:
    """How much of a walltime is left to a run whose scheduler ends none of its jobs; of none, no end."""
    if walltime is None:
        return float("inf")
    return opened_at(run_dir) + walltime - time.time()
