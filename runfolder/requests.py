"""What is asked of a run: by people, in RUN_DIR/requests; of one attempt by its controller, in attempts/N/stop.json.

A stop is a wish with a deadline: the trainer saves and returns, and only who does not answer in time is killed.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from runfolder.chain import Attempt, last_slot, slots
from runfolder.files import Record, names, read_json, write_json

Why = Literal["preemption", "walltime", "cancelled"]


@dataclass(frozen=True)
class Stop:
    """That an attempt is to save and end: why, the reason in words, and by when (seconds since 1970)."""

    why: Why
    reason: str
    by: float


def request_cancel(run_dir: Path, save: bool = False) -> None:
    """Ask for the end of a run, with `save` after a checkpoint; whoever leads it closes it as cancelled."""
    _request(run_dir, "cancel", {"save": save})


def cancel_requested(run_dir: Path) -> bool:
    """Whether somebody asked for the end of the run since it was last (re)opened."""
    return bool(_asked(run_dir, "cancel"))


def cancel_saves(run_dir: Path) -> bool:
    """Whether all who asked for the end of the run want a checkpoint first."""
    asked = _asked(run_dir, "cancel")
    return bool(asked) and all(request.get("save") for request in asked)


def request_pause(run_dir: Path, step: int) -> None:
    """Ask a run to save and end after a step, or after the one that it is at, if that is later."""
    _request(run_dir, "pause", {"step": step})


def pause_step(run_dir: Path) -> int | None:
    """The first step after which somebody wants the run to pause; None where nobody does."""
    return min((int(request["step"]) for request in _asked(run_dir, "pause")), default=None)


def request_stop(attempt: Attempt, stop: Stop) -> None:
    """Ask an attempt to save and end; the first who asks sets the deadline."""
    if stop_requested(attempt) is None:
        write_json(attempt.folder / "stop.json", asdict(stop))


def stop_requested(attempt: Attempt) -> Stop | None:
    """Whether this attempt is asked to save and end."""
    return Stop(**read_json(attempt.folder / "stop.json")) if "stop.json" in names(attempt.folder) else None


def last_reopened(run_dir: Path) -> int:
    """The slot in which a run was last reopened; 0 when it never was."""
    newest_first = reversed(slots(run_dir))
    return next((slot.number for slot in newest_first if slot.claim["kind"] == "reopen"), 0)


def _request(run_dir: Path, what: str, record: Record) -> None:
    folder = run_dir / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{what}-{last_slot(run_dir)}.json", {"time": time.time(), **record})


def _asked(run_dir: Path, what: str) -> list[Record]:
    """The requests of a kind that came since the run was last (re)opened."""
    found = [name for name in names(run_dir / "requests") if name.startswith(f"{what}-") and name.endswith(".json")]
    if not found:
        return []
    reopened = last_reopened(run_dir)
    counted = [name for name in found if int(Path(name).stem.rpartition("-")[2]) >= reopened]
    return [read_json(run_dir / "requests" / name) for name in counted]
