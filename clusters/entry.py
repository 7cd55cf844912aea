"""The queue of the local cluster: one file per submitted run, there until the run is settled."""

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.controllers import controller_command
from runfolder.files import FORMAT
from runfolder.snapshot import Snapshot, snapshot
from runfolder.variables import flaw_of_variable

_DELIVERY_S = 600.0  # for so long after its end a run gets a controller again, to deliver the rest
_FIELD_TYPES: dict[str, Any] = {"run_id": str, "run_dir": str, "command": list, "workers": int, "environment": dict}


def entry_text(run_dir: Path, workers: int, environment: Mapping[str, str], secrets: Sequence[str] = ()) -> str:
    """The text of an entry: the controller's command, how many workers it needs, what it takes along."""
    entry = {
        "format": FORMAT,
        "run_id": run_dir.name,
        "run_dir": str(run_dir),
        "command": controller_command(str(run_dir)),
        "workers": workers,
        "environment": environment,
        "secrets": secrets,
    }
    return json.dumps(entry, indent=1)


class DamagedEntry(ValueError):
    """A file of the queue that is no entry, or one of another version: what is wrong, in one line."""


@dataclass(frozen=True)
class QueueEntry:
    """A submitted run, as the text of its request says: where it is, what it wants, what it takes along."""

    run_id: str
    run_dir: Path
    command: list[str]  # of its controller
    workers: int
    environment: dict[str, str]
    text: str
    time: int  # when it came, in ns


@dataclass(frozen=True)
class QueuedRun:
    """An entry, and how its run stands; None: its folder was removed."""

    entry: QueueEntry
    run: Snapshot | None

    @property
    def finished(self) -> bool:
        """Whether the run has its final word, or its folder was removed."""
        if self.run is None:
            return True
        return self.run.result is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: MLflow has all of the finished run, or had its time to take it."""
        if self.run is None:
            return True
        if self.run.closed is None:
            return False
        return self.run.delivered or time.time() - self.run.closed > _DELIVERY_S

    @property
    def cancelled(self) -> bool:
        """Whether the end of the run was requested since it was last opened."""
        if self.run is None:
            return False
        return self.run.cancelled

    @property
    def damaged(self) -> str | None:
        """Why its folder cannot be read, in one line: then nothing is done with the run until somebody mends that."""
        return self.run.damaged if self.run else None


def queued_run(entry: QueueEntry) -> QueuedRun:
    """How the run of an entry stands now."""
    if not entry.run_dir.exists():
        return QueuedRun(entry, None)
    return QueuedRun(entry, snapshot(entry.run_dir))


@dataclass(frozen=True)
class Queue:
    """A folder of entries, named by run id. Files that are no entries hold up nobody; `read` says why."""

    folder: Path

    def add(self, run_id: str, text: str) -> None:
        """Add an entry; nothing changes when the run has one, and one that cannot be read is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(run_id)
        temporary = self.folder / f".{uuid.uuid4().hex}"
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

    def remove(self, entry: QueueEntry) -> None:
        """Take out the entry of a finished run; it stays when the run was reopened meanwhile."""
        self._path(entry.run_id).unlink(missing_ok=True)
        if not queued_run(entry).finished:
            self.add(entry.run_id, entry.text)

    def get(self, run_id: str) -> QueueEntry | None:
        """The entry of a run; raises DamagedEntry."""
        path = self._path(run_id)
        try:
            text = path.read_text()
            entry = _parse_entry(text, run_id, path.stat().st_mtime_ns)
            entry.run_dir.exists()  # raises for a path that the system refuses, as one that is too long
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise DamagedEntry(f"{path}: {reason}") from None
        return entry

    def list(self) -> list[QueueEntry]:
        """All entries, in the order of submission."""
        entries, _ = self.read()
        return [*entries]

    def read(self) -> tuple[Sequence[QueueEntry], dict[str, str]]:
        """All entries, in the order of submission; and what is no entry: the name of the file -> why, in one line."""
        entries = []
        damaged = {}
        for path in self.folder.glob("[!.]*.json"):
            try:
                entry = self.get(path.stem)
            except DamagedEntry as error:
                damaged[path.stem] = str(error)
                continue
            if entry:
                entries.append(entry)
        entries.sort(key=lambda entry: (entry.time, entry.run_id))
        return entries, damaged

    def _readable(self, run_id: str) -> bool:
        try:
            return self.get(run_id) is not None
        except DamagedEntry:
            return False

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"


def _parse_entry(text: str, run_id: str, timestamp_ns: int) -> QueueEntry:
    """The entry in the text of a run's file, submitted at a time in ns; raises ValueError."""
    plain = json.loads(text)
    _require_format(plain)
    fields = {}
    for name, type_ in _FIELD_TYPES.items():
        value = plain.get(name)
        if not isinstance(value, type_):
            raise ValueError(f"{name}: found {type(value).__name__}; allowed: {type_.__name__}")
        fields[name] = value
    if plain["run_id"] != run_id:
        raise ValueError(f"run_id: found {plain['run_id']!r}; allowed: the name of the file")
    for argument in [*plain["environment"].values(), *plain["command"]]:
        if not isinstance(argument, str) or "\0" in argument:
            raise ValueError("environment or command: found a value that no process can have")
    for name, value in plain["environment"].items():
        flaw = flaw_of_variable(name, value)
        if flaw:
            raise ValueError(f"environment: {flaw}")
    fields["run_dir"] = Path(plain["run_dir"])
    return QueueEntry(**fields, text=text, time=timestamp_ns)


def _require_format(plain: object) -> None:
    """Raise ValueError where what a file holds is of another format."""
    if not isinstance(plain, dict):
        kind = type(plain).__name__
    elif plain.get("format", FORMAT) != FORMAT:
        kind = f"format {plain['format']}"
    else:
        return
    raise ValueError(f"found {kind}; allowed: format {FORMAT} (is it of another version?)")
