"""The run folder as its writers see it: attempts that are claimed once, fenced, and closed once.

All truth about a run lies in RUN_DIR, a POSIX folder that the nodes share. Exclusive creation, append, fsync and
rename are all that is asked of it.

The attempts form a chain. Slot n + 1 is taken exactly once, by renaming a prepared folder (never empty) onto its
name: either by a successor that goes on from a checkpoint, or by attempt n itself (or whoever found it dead), which
closes the chain with the result inside the claim. So an attempt that was paused and wakes cannot finish a run that
went on without it, and a run that is closed cannot go on.

A run that failed or was cancelled can be reopened: its closing slot is followed by a `reopen` slot. The chain is the
truth; `result.json` is a copy of the last closing slot's result for those who only want to look, which `settle`
makes right.

A successor writes `seals.json` first: the sizes of its predecessors' appended files. What a paused attempt appends
later lies behind the seal, and readers stop there.

Slots are found by listing their folder, and read from the newest backwards: a run may have many.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runfolder.files import Record, names, read_json, refresh, sync_folder, write_json


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
        """RUN_DIR/attempts/<number>."""
        return self.run_dir / "attempts" / str(self.number)

    @cached_property
    def claim(self) -> Record:
        """What was written when the slot was taken; it never changes."""
        try:
            return read_json(self.folder / "claim.json")
        except FileNotFoundError:
            if str(self.number) not in names(self.folder.parent):
                raise
        # This client still believes what it was told before the slot was taken, as when it wanted the slot itself.
        # The server refuses to make what is there, and with that the client forgets it.
        with suppress(FileExistsError):
            self.folder.mkdir()
        return read_json(self.folder / "claim.json")

    @property
    def start(self) -> Start | None:
        """The checkpoint that this attempt goes on from; None from the beginning."""
        start = self.claim["start"]
        return Start(**start) if start else None

    @property
    def verdict(self) -> Record | None:
        """How this attempt ended, once that is known."""
        return read_json(self.folder / "verdict.json") if "verdict.json" in names(self.folder) else None

    def is_live(self) -> bool:
        """Whether no later slot is taken, as far as this host knows: a client of NFS may learn it a minute late."""
        return last_slot(self.run_dir) <= self.number

    def check(self, here: bool = False) -> None:
        """Raise Fenced when a later slot is taken on any host; to be called before what a ghost must not do.

        `here`: as far as this host knows, which costs the file system little; enough for those who wait.
        """
        if not here:
            refresh(self.folder.parent)
        if not self.is_live():
            raise Fenced(f"attempt {self.number} of {self.run_dir.name} has a successor")

    def append(self, file: str, record: Record) -> None:
        """Append one JSON line to `events.jsonl` or `metrics.jsonl` of this attempt."""
        with (self.folder / file).open("ab") as stream:
            stream.write(json.dumps(record, allow_nan=True).encode() + b"\n")

    def appended(self) -> list[str]:
        """The files that this attempt appends to: rows, events, and the logs of its workers."""
        logs = [f"logs/{name}" for name in names(self.folder / "logs")]
        return sorted(file for file in (*names(self.folder), *logs) if file.endswith((".jsonl", ".log")))

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event with the time of now."""
        self.append("events.jsonl", {"time": time.time(), "event": kind, **fields})

    def alive(self) -> None:
        """Show that work goes on where nothing is written for long; to be called by that work, as it gets further."""
        (self.folder / "alive").touch()

    def sync(self, file: str) -> None:
        """Make what was appended to a file survive a crash of the machine."""
        path = self.folder / file
        if path.exists():
            with path.open("ab") as stream:
                os.fsync(stream.fileno())

    def write_verdict(self, verdict: Record) -> None:
        """Say how this attempt ended."""
        write_json(self.folder / "verdict.json", verdict)

    def close(self, result: Record) -> bool:
        """End the run with a result, as its last word.

        Returns False, and changes nothing, when the next slot is taken: this attempt has a successor.
        """
        record = {"kind": "close", "closes": self.number, "result": result}
        if _claim(self.run_dir, self.number + 1, record) is None:
            return False
        settle(self.run_dir)
        return True


def slots(run_dir: Path) -> list[Attempt]:
    """Every slot that is taken, oldest first: attempts, closing slots, and those that reopen the run."""
    return [Attempt(run_dir, number) for number in sorted(_numbers(run_dir))]


def last_slot(run_dir: Path) -> int:
    """The number of the newest slot; 0 when none is taken."""
    return max(_numbers(run_dir), default=0)


def attempts(run_dir: Path) -> list[Attempt]:
    """The attempts that were claimed, oldest first, without the closing slot."""
    return [attempt for attempt in slots(run_dir) if attempt.claim["kind"] == "attempt"]


def claim_next(run_dir: Path, start: Start | None) -> Attempt | None:
    """Claim the slot after the last one taken; None when the run is closed or somebody was faster."""
    newest, origin = _open_end(run_dir), asdict(start) if start else None
    return _claim(run_dir, newest.number + 1, {"kind": "attempt", "start": origin}) if newest else None


def close(run_dir: Path, ended: Record) -> bool:
    """End a run from outside its attempts; False when it is closed or somebody was faster."""
    newest = _open_end(run_dir)
    return newest is not None and newest.close(ended)


def last(run_dir: Path) -> Attempt:
    """The newest attempt; number 0, which has no folder, when there is none yet."""
    newest_first = reversed(slots(run_dir))
    return next((slot for slot in newest_first if slot.claim["kind"] == "attempt"), Attempt(run_dir, 0))


def bounds(run_dir: Path) -> Iterator[tuple[Attempt, float]]:
    """Each attempt, newest first, with the last step up to which its work counts."""
    bound = float("inf")
    for attempt in reversed(attempts(run_dir)):
        yield attempt, bound
        start = attempt.start
        bound = min(bound, start.step if start else 0)


def result(run_dir: Path) -> Record | None:
    """The final word on a run; None while it goes on."""
    closing = _closing(run_dir)
    ended: Record | None = closing.claim["result"] if closing else None
    return ended


def reopen(run_dir: Path) -> bool:
    """Let a run that failed or was cancelled go on; False when it is not closed, or succeeded."""
    closing = _closing(run_dir)
    if closing is None or closing.claim["result"]["state"] == "succeeded":
        return False
    settle(run_dir)  # so that its closer, who may be late, finds nothing left to move
    if _claim(run_dir, closing.number + 1, {"kind": "reopen"}) is None:
        return False
    if "output" in names(run_dir):  # an attempt had delivered it, and ended badly all the same
        with suppress(FileNotFoundError):
            (run_dir / "output").rename(closing.folder / "output")
    settle(run_dir)
    return True


def settle(run_dir: Path) -> Record | None:
    """Finish what a closing slot promised: move the output into place, write result.json; gives the result.

    In a run that goes on, a result.json that somebody wrote too late goes away. Idempotent, and any number of
    processes may do it at once: whoever comes next makes right what two have mixed up.
    """
    closing = _closing(run_dir)
    if closing is None:
        if "result.json" in names(run_dir):
            (run_dir / "result.json").unlink(missing_ok=True)
        return None
    claim = closing.claim
    made = Attempt(run_dir, claim["closes"])
    if claim["closes"] and "output" in names(made.folder) and "output" not in names(run_dir):
        with suppress(FileNotFoundError):  # somebody else moved it just now
            (made.folder / "output").rename(run_dir / "output")
    if not _says(run_dir, claim["result"]):
        write_json(run_dir / "result.json", claim["result"])
    return result(run_dir)


def _numbers(run_dir: Path) -> list[int]:
    """The numbers of all slots that are taken."""
    return [int(name) for name in names(run_dir / "attempts") if name.isdigit()]


def _closing(run_dir: Path) -> Attempt | None:
    """The slot that closes a run; None while it goes on."""
    newest = Attempt(run_dir, last_slot(run_dir))
    return newest if newest.number and newest.claim["kind"] == "close" else None


def _open_end(run_dir: Path) -> Attempt | None:
    """The newest slot of a run that goes on (number 0 before the first); None for one that is closed.

    What follows it must take the slot behind this one, not behind whatever is the newest by then: that may close it.
    """
    newest = Attempt(run_dir, last_slot(run_dir))
    return None if newest.number and newest.claim["kind"] == "close" else newest


def _says(run_dir: Path, ended: Record) -> bool:
    """Whether result.json is there, and says how the run ended."""
    if "result.json" not in names(run_dir):
        return False
    with suppress(FileNotFoundError):  # somebody writes it anew just now, or this client does not know it yet
        return read_json(run_dir / "result.json") == ended
    return False


def _claim(run_dir: Path, number: int, record: Record) -> Attempt | None:
    """Take slot `number` by renaming a folder that already holds its claim; None when it is taken."""
    folder = run_dir / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    prepared = folder / f".claim-{token}"
    prepared.mkdir()
    whose = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    write_json(prepared / "claim.json", {**record, **whose})
    attempt = Attempt(run_dir, number)
    try:
        prepared.rename(attempt.folder)
    except OSError:
        if not _is_taken(attempt):
            shutil.rmtree(prepared, ignore_errors=True)
            raise
        # The answer to a rename that was done can be lost, and asking again then fails: what counts is whose it is.
        if attempt.claim.get("token") != token:
            shutil.rmtree(prepared, ignore_errors=True)
            return None
    sync_folder(folder)
    _seal_predecessors(attempt)
    return attempt


def _is_taken(slot: Attempt) -> bool:
    """Whether the server has a slot."""
    refresh(slot.folder.parent)
    return slot.number in _numbers(slot.run_dir)


def _seal_predecessors(attempt: Attempt) -> None:
    """Write down how many bytes of each appended file count."""
    sizes: dict[str, dict[str, int]] = {}
    for earlier in slots(attempt.run_dir):
        if earlier.number < attempt.number:
            sizes[str(earlier.number)] = {file: _size(earlier.folder / file) for file in earlier.appended()}
    write_json(attempt.folder / "seals.json", sizes)


def _size(path: Path) -> int:
    """A file's size as the server has it: a client of NFS asks for it when a file is opened, else it may be old."""
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size
