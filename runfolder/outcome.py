"""The outcome of a run for those who only want to look: RUN_DIR/output and RUN_DIR/result.json.

The chain is the truth; both follow what its last closing slot says, and `chain.settle` makes them right.
"""

import time
from contextlib import suppress
from pathlib import Path

from runfolder.files import Damaged, Record, list_names, read_json, write_json

_RESULT = "result.json"


def final_word(state: str, reason: str, verdict: Record, attempt: int) -> Record:
    """The final word on a run, as claim.json and result.json have it; a verdict has its kind, and what proves it."""
    return {
        "state": state,
        "reason": reason or None,
        "verdict": verdict["kind"],
        "evidence": verdict["evidence"],
        "attempt": attempt,
        "output_dir": "output" if state == "succeeded" else None,
        "time": time.time(),
    }


def move_output(source: Path, target: Path) -> None:
    """Move the output from one folder into another, where it is in that one alone."""
    is_here = "output" in list_names(source)
    is_there = "output" in list_names(target)
    if is_here and not is_there:
        with suppress(FileNotFoundError):  # somebody else moved it just now
            (source / "output").rename(target / "output")


def write_result(run_dir: Path, ended: Record) -> None:
    """Write how the run ended, unless result.json says so already."""
    if not _is_written(run_dir, ended):
        write_json(run_dir / _RESULT, ended)


def remove_result(run_dir: Path) -> None:
    """Remove a result.json that somebody wrote too late."""
    if _RESULT in list_names(run_dir):
        (run_dir / _RESULT).unlink(missing_ok=True)


def _is_written(run_dir: Path, ended: Record) -> bool:
    """Whether result.json is there, and says how the run ended."""
    if _RESULT not in list_names(run_dir):
        return False
    with suppress(FileNotFoundError, Damaged):  # somebody writes it anew just now, or has to
        return read_json(run_dir / _RESULT) == ended
    return False
