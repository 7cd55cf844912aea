"""The queue of the local cluster: one file per submitted run, there until the run is settled."""

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder.chain import Attempt, last_slot, result
from runfolder.delivered import is_delivered
from runfolder.files import Damaged as DamagedFile
from runfolder.files import Record
from runfolder.requests import cancel_requested

FORMAT = 1
_DELIVERY_S = 600.0  # for so long after its end a run gets a controller again, to deliver the rest
_TYPES: dict[str, Any] = {"run_id": str, "run_dir": str, "command": list, "workers": int, "environment": dict}
_LONGEST = 1 << 17  # characters of one value of an environment, on Linux


class Damaged(ValueError):
    """A file of the queue that is no entry, or one of another version: what is wrong, in one line."""


@dataclass(frozen=True)
class Entry:
    """A submitted run, as the text of its request says: where it is, what it wants, what it takes along."""

    run_id: str
    run_dir: Path
    command: list[str]  # of its controller
    workers: int
    environment: dict[str, str]
    text: str
    time: int  # when it came, in ns

    @property
    def finished(self) -> bool:
        """Whether the run has its final word, or its folder was removed."""
        return not self.run_dir.exists() or self._result is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: MLflow has all of the finished run, or had its time to take it."""
        if not self.run_dir.exists():
            return True
        if self._result is None:
            return False
        closed = Attempt(self.run_dir, last_slot(self.run_dir)).claim["time"]
        return is_delivered(self.run_dir) or time.time() - closed > _DELIVERY_S

    @property
    def cancelled(self) -> bool:
        """Whether the end of the run was requested since it was last opened."""
        try:
            return cancel_requested(self.run_dir)
        except (DamagedFile, LookupError):
            return False

    @property
    def _result(self) -> Record | None:
        """The final word; a run that is damaged has none."""
        try:
            return result(self.run_dir)
        except (DamagedFile, LookupError):
            return None


@dataclass(frozen=True)
class Queue:
    """A folder of entries, named by run id. What is there and is no entry stands in nobody's way."""

    folder: Path

    def add(self, run_id: str, text: str) -> None:
        """Add an entry; nothing changes when the run has one, and one that cannot be read is replaced."""
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
            if not self._readable(run_id):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, entry: Entry) -> None:
        """Take out the entry of a finished run; it stays when the run was reopened meanwhile."""
        self._path(entry.run_id).unlink(missing_ok=True)
        if not entry.finished:
            self.add(entry.run_id, entry.text)

    def get(self, run_id: str) -> Entry | None:
        """The entry of a run; raises Damaged."""
        path = self._path(run_id)
        try:
            entry = _parsed(path.read_text(), run_id, path.stat().st_mtime_ns)
            entry.run_dir.exists()  # a folder that cannot even be asked for
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise Damaged(f"{path}: {str(error) or type(error).__name__}") from None
        return entry

    def list(self) -> list[Entry]:
        """All entries, in the order of submission."""
        return [*self.read()[0]]

    def read(self) -> tuple[Sequence[Entry], dict[str, str]]:
        """All entries, in the order of submission; and what is no entry: the name of the file -> why, in one line."""
        entries, damaged = [], {}
        for path in self.folder.glob("[!.]*.json"):
            try:
                entries += [entry] if (entry := self.get(path.stem)) else []
            except Damaged as error:
                damaged[path.stem] = str(error)
        return sorted(entries, key=lambda entry: (entry.time, entry.run_id)), damaged

    def _readable(self, run_id: str) -> bool:
        try:
            return self.get(run_id) is not None
        except Damaged:
            return False

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"


def _parsed(text: str, run_id: str, came: int) -> Entry:
    """The entry in the text of a run's file; raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = f"format {found.get('format')}" if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"found {kind}; allowed: format {FORMAT} (is it of another version?)")
    for name, type_ in _TYPES.items():
        if not isinstance(found.get(name), type_):
            raise ValueError(f"{name}: found {type(found.get(name)).__name__}; allowed: {type_.__name__}")
    if found["run_id"] != run_id:
        raise ValueError(f"run_id: found {found['run_id']!r}; allowed: the name of the file")
    texts: list[Any] = [*found["environment"].values(), *found["command"]]
    if not all(isinstance(text, str) and "\0" not in text and len(text) < _LONGEST for text in texts):
        raise ValueError("environment or command: found a value that no process can have")
    values = {name: found[name] for name in _TYPES}
    return Entry(**{**values, "run_dir": Path(found["run_dir"])}, text=text, time=came)
