"""The run folder as its writers see it: attempts that are claimed once, fenced, and closed once.

All truth about a run lies in RUN_DIR, a POSIX folder that the nodes share. Exclusive creation, append, fsync and
rename are all that is asked of it.

The attempts form a chain. Slot n + 1 is taken exactly once, by renaming a prepared folder (never empty) onto its
name: either by a successor that goes on from a checkpoint, or by attempt n itself (or whoever found it dead), which
closes the chain with the result inside the claim. So an attempt that was paused and wakes cannot finish a run that
went on without it, and a run that is closed cannot go on.

A run that failed or was cancelled can be reopened: its closing slot is followed by a `reopen` slot. The chain is the
truth; `result.json` is a copy of the last closing slot's result for those who only want to look.

A successor writes `seals.json` first: the sizes of its predecessors' appended files. What a paused attempt appends
later lies behind the seal, and readers stop there.
"""

import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder.files import Record, read_json, sync_folder, write_json


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

    @property
    def folder(self) -> Path:
        """RUN_DIR/attempts/<number>."""
        return self.run_dir / "attempts" / str(self.number)

    @property
    def claim(self) -> Record:
        """What was written when the slot was taken."""
        return read_json(self.folder / "claim.json")

    @property
    def start(self) -> Start | None:
        """The checkpoint that this attempt goes on from; None from the beginning."""
        start = self.claim["start"]
        return Start(**start) if start else None

    @property
    def verdict(self) -> Record | None:
        """How this attempt ended, once that is known."""
        path = self.folder / "verdict.json"
        return read_json(path) if path.exists() else None

    def is_live(self) -> bool:
        """Whether no later slot is taken."""
        return not (self.folder.parent / str(self.number + 1)).exists()

    def check(self) -> None:
        """Raise Fenced when a later slot is taken."""
        if not self.is_live():
            raise Fenced(f"attempt {self.number} of {self.run_dir.name} has a successor")

    def append(self, file: str, record: Record) -> None:
        """Append one JSON line to `events.jsonl` or `metrics.jsonl` of this attempt."""
        with (self.folder / file).open("ab") as stream:
            stream.write(json.dumps(record, allow_nan=True).encode() + b"\n")

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
    folder = run_dir / "attempts"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [Attempt(run_dir, number) for number in sorted(int(n) for n in names if re.fullmatch(r"\d+", n))]


def last_slot(run_dir: Path) -> int:
    """The number of the newest slot; 0 when none is taken."""
    return max((slot.number for slot in slots(run_dir)), default=0)


def attempts(run_dir: Path) -> list[Attempt]:
    """The attempts that were claimed, oldest first, without the closing slot."""
    return [attempt for attempt in slots(run_dir) if attempt.claim["kind"] == "attempt"]


def claim_next(run_dir: Path, start: Start | None) -> Attempt | None:
    """Claim the slot after the last one taken; None when the run is closed or somebody was faster."""
    if result(run_dir) is not None:
        return None
    return _claim(run_dir, last_slot(run_dir) + 1, {"kind": "attempt", "start": _plain(start)})


def close(run_dir: Path, ended: Record) -> bool:
    """End a run from outside its attempts; False when it is closed or somebody was faster."""
    if result(run_dir) is not None:
        return False
    return Attempt(run_dir, last_slot(run_dir)).close(ended)


def last(run_dir: Path) -> Attempt:
    """The newest attempt; number 0, which has no folder, when there is none yet."""
    return (attempts(run_dir) or [Attempt(run_dir, 0)])[-1]


def bounds(run_dir: Path) -> Iterator[tuple[Attempt, float]]:
    """Each attempt, newest first, with the last step up to which its work counts."""
    bound = float("inf")
    for attempt in reversed(attempts(run_dir)):
        yield attempt, bound
        start = attempt.start
        bound = min(bound, start.step if start else 0)


def result(run_dir: Path) -> Record | None:
    """The final word on a run; None while it goes on."""
    newest = last_slot(run_dir)
    claim: Record = Attempt(run_dir, newest).claim if newest else {"kind": "none"}
    ended: Record | None = claim["result"] if claim["kind"] == "close" else None
    return ended


def reopen(run_dir: Path) -> bool:
    """Let a run that failed or was cancelled go on; False when it is not closed, or succeeded."""
    ended = result(run_dir)
    if ended is None or ended["state"] == "succeeded":
        return False
    number = slots(run_dir)[-1].number
    if _claim(run_dir, number + 1, {"kind": "reopen"}) is None:
        return False
    (run_dir / "result.json").replace(run_dir / "attempts" / str(number) / "result.json")
    if (run_dir / "output").exists():  # an attempt had delivered it, and ended badly all the same
        closed = Attempt(run_dir, Attempt(run_dir, number).claim["closes"])
        (run_dir / "output").rename(closed.folder / "output")
    return True


def settle(run_dir: Path) -> Record | None:
    """Finish what a closing slot promised: move the output into place, write result.json.

    Idempotent, and any number of processes may do it at once.
    """
    newest = last_slot(run_dir)
    claim: Record = Attempt(run_dir, newest).claim if newest else {"kind": "none"}
    if claim["kind"] != "close":
        return None
    made = Attempt(run_dir, claim["closes"]).folder / "output"
    if made.exists() and not (run_dir / "output").exists():
        with suppress(FileNotFoundError):  # somebody else moved it just now
            made.rename(run_dir / "output")
    if not (run_dir / "result.json").exists():
        write_json(run_dir / "result.json", claim["result"])
    return result(run_dir)


def _plain(start: Start | None) -> Record | None:
    return {"attempt": start.attempt, "step": start.step} if start else None


def _claim(run_dir: Path, number: int, record: Record) -> Attempt | None:
    """Take slot `number` by renaming a folder that already holds its claim; None when it is taken."""
    folder = run_dir / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / f".claim-{uuid.uuid4().hex}"
    prepared.mkdir()
    write_json(
        prepared / "claim.json",
        {**record, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()},
    )
    try:
        prepared.rename(folder / str(number))
    except OSError:
        shutil.rmtree(prepared)
        if not (folder / str(number)).exists():
            raise
        return None
    sync_folder(folder)
    attempt = Attempt(run_dir, number)
    _seal_predecessors(attempt)
    return attempt


def _seal_predecessors(attempt: Attempt) -> None:
    sizes: dict[str, dict[str, int]] = {}
    for earlier in slots(attempt.run_dir):
        if earlier.number < attempt.number:
            files = [p for p in earlier.folder.rglob("*") if p.suffix in (".jsonl", ".log")]
            sizes[str(earlier.number)] = {str(p.relative_to(earlier.folder)): p.stat().st_size for p in files}
    write_json(attempt.folder / "seals.json", sizes)
