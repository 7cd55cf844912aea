"""What is asked of a run: by people, in RUN_DIR/requests; of one attempt by its controller, in attempts/N/stop.json.

A stop is a save request with a deadline: the trainer saves and returns; only who does not answer in time is killed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runfolder.chain import Attempt, last_slot, slots
from runfolder.files import Record, list_names, read_json, write_json

StopCause = Literal["preemption", "walltime", "cancelled"]


@dataclass(frozen=True)
class Stop:
    """That an attempt is to save and end: why, the reason in words, and the deadline (seconds since 1970)."""

    why: StopCause
    reason: str
    deadline: float


def request_cancel(run_dir: Path, save: bool = False) -> None:
    """Ask for the end of a run, with `save` after a checkpoint; its controller closes it as cancelled."""
    _request(run_dir, "cancel", {"save": save})


def cancel_requested(run_dir: Path) -> bool:
    """Whether somebody asked for the end of the run since it was last (re)opened."""
    requests = _requests(run_dir, "cancel")
    return bool(requests)


def cancel_saves(run_dir: Path) -> bool:
    """Whether all who asked for the end of the run want a checkpoint first."""
    requests = _requests(run_dir, "cancel")
    if not requests:
        return False
    return all(request.get("save") for request in requests)


def request_pause(run_dir: Path, step: int) -> None:
    """Ask a run to save and end after a step, or after the one that it is at, if that is later."""
    _request(run_dir, "pause", {"step": step})


def pause_step(run_dir: Path) -> int | None:
    """The first step after which somebody wants the run to pause; None where nobody does."""
    requests = _requests(run_dir, "pause")
    steps = [int(request["step"]) for request in requests]
    return min(steps, default=None)


def request_stop(attempt: Attempt, stop: Stop) -> None:
    """Ask an attempt to save and end; the first who asks sets the deadline."""
    if stop_requested(attempt) is None:
        record = {"why": stop.why, "reason": stop.reason, "by": stop.deadline}
        write_json(attempt.folder / "stop.json", record)


def stop_requested(attempt: Attempt) -> Stop | None:
    """The request to this attempt to save and end; None while there is none."""
    if "stop.json" not in list_names(attempt.folder):
        return None
    record = read_json(attempt.folder / "stop.json")
    return Stop(record["why"], record["reason"], deadline=record["by"])


def last_reopened(run_dir: Path) -> int:
    """The slot in which a run was last reopened; 0 when it never was."""
    for slot in reversed(slots(run_dir)):
        if slot.kind == "reopen":
            return slot.number
    return 0


def _request(run_dir: Path, kind: str, record: Record) -> None:
    folder = run_dir / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    newest = last_slot(run_dir)
    path = folder / f"{kind}-{newest}.json"
    write_json(path, {"time": time.time(), **record})


def _requests(run_dir: Path, kind: str) -> list[Record]:
    """The requests of a kind that came since the run was last (re)opened."""
    folder = run_dir / "requests"
    prefix = f"{kind}-"
    files = []
    for name in list_names(folder):
        if name.startswith(prefix) and name.endswith(".json"):
            files.append(name)
    if not files:
        return []
    reopened = last_reopened(run_dir)
    current = [name for name in files if _slot_of(name) >= reopened]
    paths = [folder / name for name in current]
    return [read_json(path) for path in paths]


def _slot_of(name: str) -> int:
    """The newest slot when a request was made, which its file's name ends with: `<kind>-<slot>.json`."""
    stem = Path(name).stem
    return int(stem.rpartition("-")[2])
