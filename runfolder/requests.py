"""What is asked of a run: by people, in RUN_DIR/requests; of one attempt by its controller, in attempts/N/stop.json.

A stop is a save request with a deadline: the trainer saves and returns; only who does not answer in time is killed.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from runfolder.chain import Attempt, attempts, last_slot, see_slots, slots
from runfolder.files import Record, list_names, read_json, write_json
from runfolder.shapes import CANCEL, PAUSE, STOP, FileShape

StopCause = Literal["preemption", "walltime", "cancelled"]


@dataclass(frozen=True)
class Stop:
    """That an attempt is to save and end: why, the reason in words, and the deadline (seconds since 1970)."""

    why: StopCause
    reason: str
    deadline: float


class Pause(NamedTuple):
    """That a run is to save and end after a step, and its newest slot when somebody asked for that."""

    step: int
    slot: int


def request_cancel(run_dir: Path, save: bool = False, why: str | None = None) -> None:
    """Ask for the end of a run, with `save` after a checkpoint; its controller closes it as cancelled.

    `why`: where nobody wants that, but it cannot go on.
    """
    if save and cancel_requested(run_dir) and not cancel_saves(run_dir):
        return  # it is to end at once already
    _request(run_dir, "cancel", {"save": save} | ({"why": why} if why else {}))


def cancel_requested(run_dir: Path) -> bool:
    """Whether somebody asked for the end of the run since it was last (re)opened."""
    return bool(_current_files(run_dir, "cancel"))


def cancel_saves(run_dir: Path) -> bool:
    """Whether all who asked for the end of the run want a checkpoint first."""
    requests = _requests(run_dir, "cancel", CANCEL)
    if not requests:
        return False
    return all(request.get("save") for _, request in requests)


def why_cancelled(run_dir: Path) -> str:
    """Why the end of a run was asked for, in words."""
    for _, request in _requests(run_dir, "cancel", CANCEL):
        why = request.get("why")
        if why:
            return str(why)
    return "cancelled by request"


def request_pause(run_dir: Path, step: int) -> None:
    """Ask a run to save and end after a step, or after the one that it is at, if that is later."""
    _request(run_dir, "pause", {"step": step})


def pause_step(run_dir: Path) -> int | None:
    """The first step after which somebody wants the run to pause; None where nobody does."""
    steps = [pause.step for pause in pauses(run_dir)]
    return min(steps, default=None)


def pauses(run_dir: Path) -> list[Pause]:
    """The pauses that somebody wants of a run, those that it has made since it was last (re)opened too."""
    wanted = []
    for slot, request in _requests(run_dir, "pause", PAUSE):
        pause = Pause(request["step"], slot)
        wanted.append(pause)
    return wanted


def pause_due(attempt: Attempt) -> int | None:
    """The first step after which an attempt is to pause, but for what an earlier one has paused for; None: none."""
    start = attempt.start
    first = start.step if start else 0
    steps = []
    for pause in pauses(attempt.run_dir):
        was_made = pause.step <= first and pause.slot <= _last_paused(attempt)
        if not was_made:
            steps.append(pause.step)
    return min(steps, default=None)


def _last_paused(attempt: Attempt) -> int:
    """The newest earlier attempt whose verdict is that it has paused; -1 where there is none."""
    for earlier in reversed(attempts(attempt.run_dir)):
        if earlier.number < attempt.number:
            verdict = earlier.verdict
            if verdict is not None and verdict["kind"] == "paused":
                return earlier.number
    return -1  # before slot 0, in which a pause can be asked for


def request_stop(attempt: Attempt, stop: Stop) -> None:
    """Ask an attempt to save and end; the first who asks sets the deadline."""
    if stop_requested(attempt) is None:
        file = attempt.folder / "stop.json"
        record = {"why": stop.why, "reason": stop.reason, "by": stop.deadline}
        write_json(file, record)


def stop_requested(attempt: Attempt) -> Stop | None:
    """The request to this attempt to save and end; None while there is none."""
    if "stop.json" not in list_names(attempt.folder):
        return None
    record = read_json(attempt.folder / "stop.json", STOP)
    return Stop(record["why"], record["reason"], deadline=record["by"])


def last_reopened(run_dir: Path) -> int:
    """The slot in which a run was last reopened; 0 when it never was."""
    for slot in reversed(slots(run_dir)):
        if slot.kind == "reopen":
            return slot.number
    return 0


def opened_at(run_dir: Path) -> float:
    """When the first attempt since a run was last (re)opened was claimed (seconds since 1970); now before that."""
    reopened = last_reopened(run_dir)
    for slot in slots(run_dir):
        if slot.number > reopened:
            claim = slot.claim
            return float(claim["time"])
    return time.time()


def _request(run_dir: Path, kind: str, record: Record) -> None:
    folder = run_dir / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    see_slots(run_dir)  # a request counts from the slot on that it names: after a reopening that this host has missed
    newest = last_slot(run_dir)
    path = folder / f"{kind}-{newest}.json"
    write_json(path, {"time": time.time(), **record})


def _requests(run_dir: Path, kind: str, shape: FileShape) -> list[tuple[int, Record]]:
    """The requests of a kind that came since the run was last (re)opened, each with its newest slot then."""
    requests = []
    for slot, path in _current_files(run_dir, kind):
        request = read_json(path, shape)
        requests.append((slot, request))
    return requests


def _current_files(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """The files of these requests: `<kind>-<slot>.json`, by the newest slot when they were made."""
    folder = run_dir / "requests"
    slot_of = {}
    for name in list_names(folder):
        match = re.fullmatch(rf"{kind}-(\d{{1,9}})\.json", name)
        if match:
            slot_of[name] = int(match[1])
    if not slot_of:
        return []
    reopened = last_reopened(run_dir)
    return [(slot, folder / name) for name, slot in slot_of.items() if slot >= reopened]
