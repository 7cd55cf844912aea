"""The run folder as its writers see it: attempts that are claimed once, fenced, and closed once.

All truth about a run lies in RUN_DIR, a POSIX folder that the nodes share. Exclusive creation, append, fsync and
rename are all that is asked of it.

The attempts form a chain. Slot n + 1 is taken exactly once, by renaming a prepared folder (never empty) onto its
name: either by a successor that goes on from a checkpoint, or by attempt n itself (or whoever found it dead), which
closes the chain with the result inside the claim. So an attempt that was paused and wakes cannot finish a run that
went on without it, and a run that is closed cannot go on.

A run that failed or was cancelled can be reopened: its closing slot is followed by a `reopen` slot. The chain is the
truth; `output` and `result.json` follow it (see outcome.py).

A slot that is taken seals what its predecessors have appended (see seals.py).

A run may have many slots: they are found by listing their folder, and read from the newest backwards.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runfolder.claims import prepare_claim, read_claim
from runfolder.files import Record, list_names, read_json, refresh, sync_folder, write_json
from runfolder.outcome import move_output, remove_result, write_result
from runfolder.seals import appended, write_seals
from runfolder.shapes import VERDICT


class Fenced(RuntimeError):
    """This attempt is not the live one any more; it must stop and touch nothing."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that an attempt goes on from."""

    attempt: int
    step: int


@dataclass(frozen=True)
class Attempt:
    """One try at a run: a folder under RUN_DIR/attempts with one writer."""

    run_dir: Path
    number: int

    @cached_property
    def folder(self) -> Path:
        """The folder of this slot: RUN_DIR/attempts/<number>."""
        slots_dir = self.run_dir / "attempts"
        return slots_dir / str(self.number)

    @cached_property
    def claim(self) -> Record:
        """What was written when the slot was taken; it never changes."""
        return read_claim(self.folder)

    @property
    def start(self) -> Start | None:
        """The checkpoint that this attempt goes on from; None from the beginning."""
        start = self.claim["start"]
        if not start:
            return None
        return Start(start["attempt"], start["step"])

    @property
    def kind(self) -> str:
        """What the slot was taken for: `attempt`, `close` or `reopen`."""
        kind: str = self.claim["kind"]
        return kind

    @property
    def verdict(self) -> Record | None:
        """How this attempt ended, once that is known."""
        if "verdict.json" not in list_names(self.folder):
            return None
        return read_json(self.folder / "verdict.json", VERDICT)

    def is_live(self) -> bool:
        """Whether no later slot is taken, as far as this host knows: a client of NFS may learn it a minute late."""
        newest = last_slot(self.run_dir)
        return newest <= self.number

    def check(self, cached: bool = False) -> None:
        """Raise Fenced when a later slot is taken on any host; to be called before what only a live attempt may do.

        `cached`: as far as this host knows, which costs the file system little; enough for those who wait.
        """
        if not cached:
            refresh(self.folder.parent)
        if not self.is_live():
            raise Fenced(f"attempt {self.number} of {self.run_dir.name} has a successor")

    def append(self, file: str, record: Record) -> None:
        """Append one JSON line to `events.jsonl` or `metrics.jsonl` of this attempt."""
        path = self.folder / file
        with path.open("ab") as stream:
            line = json.dumps(record, allow_nan=True)
            stream.write(line.encode() + b"\n")

    def appended(self) -> list[str]:
        """The files that this attempt appends to: rows, events, and the logs of its workers."""
        return appended(self.folder)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event with the time of now."""
        event = {"time": time.time(), "event": kind, **fields}
        self.append("events.jsonl", event)

    def note_progress(self) -> None:
        """Touch the file `alive`, as a sign that work goes on which writes nothing for long; that work calls it."""
        (self.folder / "alive").touch()

    def sync(self, file: str) -> None:
        """Make what was appended to a file survive a crash of the machine."""
        path = self.folder / file
        if path.exists():
            with path.open("ab") as stream:
                os.fsync(stream.fileno())

    def write_verdict(self, verdict: Record) -> None:
        """Write down how this attempt ended, in verdict.json, with the time of now."""
        record = {"time": time.time(), **verdict}
        write_json(self.folder / "verdict.json", record)

    def close(self, result: Record) -> bool:
        """End the run with a result, as its last word.

        Returns False, and changes nothing, when the next slot is taken: this attempt has a successor.
        """
        record = {"kind": "close", "closes": self.number, "result": result}
        if _take_slot(self.run_dir, self.number + 1, record) is None:
            return False
        settle(self.run_dir)
        return True


def see_slots(run_dir: Path) -> None:
    """See to it that the next look at a run's slots shows those of all hosts, for those who go on from the newest."""
    folder = run_dir / "attempts"
    folder.mkdir(exist_ok=True)  # where this client believes that there is none, only the server can tell
    refresh(folder)


def slots(run_dir: Path) -> list[Attempt]:
    """Every slot that is taken, oldest first: attempts, closing slots, and those that reopen the run."""
    numbers = sorted(_slot_numbers(run_dir))
    return [Attempt(run_dir, number) for number in numbers]


def last_slot(run_dir: Path) -> int:
    """The number of the newest slot; 0 when none is taken."""
    return max(_slot_numbers(run_dir), default=0)


def attempts(run_dir: Path) -> list[Attempt]:
    """The attempts that were claimed, oldest first, without the closing slot."""
    taken = slots(run_dir)
    return [slot for slot in taken if slot.kind == "attempt"]


def claim_next(run_dir: Path, start: Start | None) -> Attempt | None:
    """Claim the slot after the last one taken; None when the run is closed or somebody was faster."""
    see_slots(run_dir)
    newest = _newest_slot(run_dir)
    if _is_closing(newest):
        return None
    origin = asdict(start) if start else None
    record = {"kind": "attempt", "start": origin}
    return _take_slot(run_dir, newest.number + 1, record)


def close(run_dir: Path, ended: Record) -> bool:
    """End a run from outside its attempts; False when it is closed or somebody was faster."""
    see_slots(run_dir)
    newest = _newest_slot(run_dir)
    if _is_closing(newest):
        return False
    return newest.close(ended)


def last_attempt(run_dir: Path) -> Attempt:
    """The newest attempt; number 0, which has no folder, when there is none yet."""
    return newest_attempt(run_dir, slots(run_dir))


def newest_attempt(run_dir: Path, taken: Sequence[Attempt]) -> Attempt:
    """The newest attempt among slots (oldest first); number 0, which has no folder, when there is none."""
    for slot in reversed(taken):
        if slot.kind == "attempt":
            return slot
    return Attempt(run_dir, 0)


def step_bounds(run_dir: Path) -> Iterator[tuple[Attempt, float]]:
    """Each attempt, newest first, with the last step up to which its work counts."""
    bound = float("inf")
    for attempt in reversed(attempts(run_dir)):
        yield attempt, bound
        start = attempt.start
        start_step = start.step if start else 0
        bound = min(bound, start_step)


def result(run_dir: Path) -> Record | None:
    """The final word on a run; None while it goes on."""
    newest = _newest_slot(run_dir)
    if not _is_closing(newest):
        return None
    ended: Record = newest.claim["result"]
    return ended


def reopen(run_dir: Path) -> bool:
    """Let a run that failed or was cancelled go on; False when it is not closed, or succeeded."""
    see_slots(run_dir)
    closing = _newest_slot(run_dir)
    if not _is_closing(closing) or closing.claim["result"]["state"] == "succeeded":
        return False
    settle(run_dir)  # so that its closer, who may be late, finds nothing left to move
    if _take_slot(run_dir, closing.number + 1, {"kind": "reopen"}) is None:
        return False
    move_output(run_dir, closing.folder)  # that of an attempt which had delivered it, and ended badly all the same
    settle(run_dir)
    return True


def settle(run_dir: Path) -> Record | None:
    """Finish what a closing slot promised: move the output into place, write result.json; gives the result.

    In a run that goes on, a result.json that somebody wrote too late goes away. Idempotent, and any number of
    processes may do it at once. Who was paused in here may be overtaken by a later slot: it looks, and follows that.
    """
    see_slots(run_dir)
    newest = _newest_slot(run_dir)
    if _is_closing(newest):
        closed = Attempt(run_dir, newest.claim["closes"])
        move_output(closed.folder, run_dir)
        write_result(run_dir, newest.claim["result"])
    else:
        remove_result(run_dir)
    see_slots(run_dir)
    if last_slot(run_dir) != newest.number:
        return settle(run_dir)
    return result(run_dir)


def _slot_numbers(run_dir: Path) -> list[int]:
    """The numbers of all slots that are taken."""
    numbers = []
    for name in list_names(run_dir / "attempts"):
        if name.isdecimal() and name == str(int(name)):
            numbers.append(int(name))
    return numbers


def _newest_slot(run_dir: Path) -> Attempt:
    """The newest slot that is taken; number 0, which has no folder, before the first.

    Who goes on from it must take the slot behind this one: what is the newest by then may close the run.
    """
    return Attempt(run_dir, last_slot(run_dir))


def _is_closing(slot: Attempt) -> bool:
    """Whether the run is closed if this is its newest slot."""
    is_taken = slot.number > 0
    return is_taken and slot.kind == "close"


def _take_slot(run_dir: Path, number: int, record: Record) -> Attempt | None:
    """Take slot `number` by renaming a folder that already holds its claim; None when it is taken."""
    folder = run_dir / "attempts"
    token = uuid.uuid4().hex
    prepared = prepare_claim(folder, token, record)
    attempt = Attempt(run_dir, number)
    try:
        prepared.rename(attempt.folder)
    except OSError:
        see_slots(run_dir)
        if number not in _slot_numbers(run_dir):
            shutil.rmtree(prepared, ignore_errors=True)
            raise
        # The answer to a rename that was done can be lost, and repeating it fails: what counts is whose claim it is.
        if attempt.claim.get("token") != token:
            shutil.rmtree(prepared, ignore_errors=True)
            return None
    sync_folder(folder)
    predecessors = [slot.folder for slot in slots(run_dir) if slot.number < number]
    write_seals(attempt.folder, predecessors)
    return attempt
