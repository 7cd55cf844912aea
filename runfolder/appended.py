"""Appended files of attempts (metrics, events, logs): one way to read them, up to their seals, as they grow."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runfolder.chain import Attempt, slots
from runfolder.files import Record, names, read_json


@dataclass(frozen=True)
class Position:
    """How far a file that many attempts append to was read: all of the attempts before, and so many bytes of this."""

    attempt: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Chunk:
    """Bytes of one attempt's file from some position on, and the position behind them.

    `sealed`: the attempt has a successor, so nothing that counts is ever added.
    """

    data: bytes
    after: Position
    sealed: bool


Source = Callable[[Position], Iterable[Chunk]]  # what was appended to some file since a position


class Follower:
    """Follows an appended file over all attempts of a run as it grows; gives every byte that counts once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._since = Position()

    def read(self, torn: bool = False) -> Iterator[tuple[int, bytes]]:
        """What is new, as (attempt, bytes): whole lines, and with `torn`, or at its end, a line that is not whole."""
        for chunk in self._source(self._since):
            whole = len(chunk.data) if torn or chunk.sealed else chunk.data.rfind(b"\n") + 1
            self._since = Position(chunk.after.attempt, chunk.after.offset - len(chunk.data) + whole)
            yield chunk.after.attempt, chunk.data[:whole]


def read_from(run_dir: Path, file: str, since: Position) -> Iterator[Chunk]:
    """What was appended to a file since a position: one chunk for each attempt that has the file, oldest first.

    Of an attempt's successors nothing is given before it is known how much of its own counts.
    """
    for slot in slots(run_dir):
        if slot.number >= since.attempt and _exists(slot.folder / file):
            offset = since.offset if slot.number == since.attempt else 0
            seal = sealed_size(slot, file)
            data = _read(slot.folder / file, offset, seal)
            yield Chunk(data, Position(slot.number, offset + len(data)), seal is not None)
            if seal is None:
                return


def appended_files(run_dir: Path) -> list[str]:
    """The files that attempts of a run append to, relative to their folders."""
    return sorted({file for slot in slots(run_dir) for file in slot.appended()})


def read_lines(attempt: Attempt, file: str) -> list[Record]:
    """The records of an appended file, up to its seal; a torn last line is dropped."""
    return parsed(beginning(attempt, file))


def beginning(attempt: Attempt, file: str, size: int | None = None) -> bytes:
    """The first bytes of a file that count: all, or as many as `size`; nothing where there is no such file."""
    if not _exists(attempt.folder / file):
        return b""
    seal = sealed_size(attempt, file)
    limits = [limit for limit in (seal, size) if limit is not None]
    return _read(attempt.folder / file, 0, min(limits, default=None))


def ending(attempt: Attempt, file: str, size: int) -> bytes:
    """The last `size` bytes of a file that count; nothing where there is no such file."""
    path = attempt.folder / file
    if not _exists(path):
        return b""
    stop = sealed_size(attempt, file)
    stop = path.stat().st_size if stop is None else stop
    return _read(path, max(0, stop - size), stop)


def parsed(data: bytes) -> list[Record]:
    """The records in whole lines of JSON."""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]


def sealed_size(attempt: Attempt, file: str) -> int | None:
    """How many bytes of an appended file count; None while no later slot (a closing one, too) has sealed it."""
    for later in slots(attempt.run_dir):
        if later.number > attempt.number and "seals.json" in names(later.folder):
            sizes = read_json(later.folder / "seals.json").get(str(attempt.number))
            if sizes is not None:
                return int(sizes.get(file, 0))
    return None


def _exists(path: Path) -> bool:
    return path.name in names(path.parent)


def _read(path: Path, start: int, stop: int | None) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(-1 if stop is None else max(stop - start, 0))
