"""The queue of the local cluster: one file per submitted run, there until the run is settled."""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runfolder.chain import Attempt, last_slot, result
from runfolder.delivered import is_delivered
from runfolder.requests import cancel_requested

_DELIVERY_S = 600.0  # for so long after its end a run gets a controller again, to deliver the rest


@dataclass(frozen=True)
class Entry:
    """A submitted run: where it is, how many workers it wants, what it takes along, when it came (mtime, in ns)."""

    text: str
    time: int

    def __post_init__(self) -> None:
        """Raise ValueError, TypeError or KeyError where the text is no entry of ours."""
        if not (isinstance(self.plan["workers"], int) and self.run_id and self.run_dir):
            raise ValueError("no entry of a queue")

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The text as plain data."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def run_id(self) -> str:
        """Whose entry it is."""
        return str(self.plan["run_id"])

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.plan["run_dir"])

    @property
    def workers(self) -> int:
        """How many workers it needs room for."""
        return int(self.plan["workers"])

    @property
    def environment(self) -> dict[str, str]:
        """What it takes along, beside its secrets."""
        return dict(self.plan["environment"])

    @property
    def finished(self) -> bool:
        """Whether the run has its final word, or its folder was removed."""
        return not self.run_dir.exists() or result(self.run_dir) is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: MLflow has all of the finished run, or had its time to take it."""
        if not self.run_dir.exists():
            return True
        ended = result(self.run_dir)
        if ended is None:
            return False
        closed = Attempt(self.run_dir, last_slot(self.run_dir)).claim["time"]
        return is_delivered(self.run_dir) or time.time() - closed > _DELIVERY_S

    @property
    def cancelled(self) -> bool:
        """Whether the end of the run was requested since it was last opened."""
        return cancel_requested(self.run_dir)


@dataclass(frozen=True)
class Queue:
    """A folder of entries, named by run id."""

    folder: Path

    def add(self, run_id: str, text: str) -> None:
        """Add an entry; nothing changes when the run has one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, temporary = self._path(run_id), self.folder / f".{uuid.uuid4().hex}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)  # unlike a rename, it leaves an earlier entry and its turn alone
        except FileExistsError:
            return
        finally:
            temporary.unlink()

    def remove(self, entry: Entry) -> None:
        """Take out the entry of a finished run; it stays when the run was reopened meanwhile."""
        self._path(entry.run_id).unlink(missing_ok=True)
        if not entry.finished:
            self.add(entry.run_id, entry.text)

    def get(self, run_id: str) -> Entry | None:
        """The entry of a run."""
        path = self._path(run_id)
        try:
            return Entry(path.read_text(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:  # of another version, or damaged: the others go on
            print(f"{path}: no entry of this Fleetune's queue ({type(error).__name__}: {error})", file=sys.stderr)
            return None

    def list(self) -> list[Entry]:
        """All entries, in the order of submission."""
        return sorted(self._read(), key=lambda entry: (entry.time, entry.run_id))

    def _read(self) -> Iterator[Entry]:
        for path in self.folder.glob("[!.]*.json"):
            if entry := self.get(path.stem):
                yield entry

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"
