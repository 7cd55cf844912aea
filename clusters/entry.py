"""The queue of the local cluster: one file per submitted run, there until the run is settled."""

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_DELIVERY_S = 600.0  # for so long after its end a run gets a controller again, to deliver the rest
_TYPES: dict[str, Any] = {"run_id": str, "run_dir": str, "workers": int, "time": (int, float), "environment": dict}
_LONGEST = 1 << 17  # characters of one value of an environment, on Linux


class Damaged(ValueError):
    """A file of the queue that is no entry, or one of another version: what is wrong, in one line."""


@dataclass(frozen=True)
class Entry:
    """A submitted run: where it is, how many workers it wants, when it came, what it takes along."""

    run_id: str
    run_dir: str
    workers: int
    time: float
    environment: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether the run has its final word, or its folder was removed."""
        folder = Path(self.run_dir)
        return (folder / "result.json").exists() or not folder.exists()

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: MLflow has all of the finished run, or had its time to take it."""
        result, tracked = (Path(self.run_dir, name) for name in ("result.json", "tracked.json"))
        if not self.finished or not result.exists():
            return self.finished
        ended = result.stat().st_mtime
        return (tracked.exists() and tracked.stat().st_mtime >= ended) or time.time() - ended > _DELIVERY_S

    @property
    def cancelled(self) -> bool:
        """Whether the end of the run was requested since it was submitted."""
        requests = Path(self.run_dir, "requests").glob("cancel-*.json")
        return any(request.stat().st_mtime >= self.time for request in requests)


@dataclass(frozen=True)
class Queue:
    """A folder of entries, named by run id. What is there and is no entry stands in nobody's way."""

    folder: Path

    def add(self, entry: Entry) -> None:
        """Add an entry; nothing changes when the run has one, and one that cannot be read is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, temporary = self._path(entry.run_id), self.folder / f".{uuid.uuid4().hex}"
        # Only for its owner: the environment may hold tokens.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(entry), stream, indent=1)
            stream.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)  # unlike a rename, it leaves an earlier entry and its turn alone
        except FileExistsError:
            if not self._readable(entry.run_id):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, entry: Entry) -> None:
        """Take out the entry of a finished run; it stays when the run was reopened meanwhile."""
        self._path(entry.run_id).unlink(missing_ok=True)
        if not entry.finished:
            self.add(entry)

    def get(self, run_id: str) -> Entry | None:
        """The entry of a run; raises Damaged."""
        path = self._path(run_id)
        try:
            entry = _parsed(path.read_text(), run_id)
            Path(entry.run_dir).exists()  # a folder that cannot even be asked for
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


def _parsed(text: str, run_id: str) -> Entry:
    """The entry in the text of a run's file; raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.keys() != _TYPES.keys():
        keys = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"found {keys or 'nothing'}; allowed: {', '.join(_TYPES)} (is it of another version?)")
    for name, value in found.items():
        if not isinstance(value, _TYPES[name]):
            raise ValueError(f"{name}: found {type(value).__name__}")
    if found["run_id"] != run_id:
        raise ValueError(f"run_id: found {found['run_id']!r}; allowed: the name of the file")
    if not all(isinstance(v, str) and "\0" not in v and len(v) < _LONGEST for v in found["environment"].values()):
        raise ValueError("environment: found a value that no process can have")
    return Entry(**found)
