"""Appended files of attempts (metrics, events, logs): one way to read them, up to their seals, as they grow."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runfolder.chain import Attempt, slots
from runfolder.files import Damaged, Record, list_names
from runfolder.seals import read_seal
from runfolder.shapes import EVENT, ROW, FileShape, flaw_of

READ_AT_ONCE = 2 << 20  # bytes of a file that are read at once, at most


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

    @property
    def is_full(self) -> bool:
        """Whether more of the file may be there already."""
        return len(self.data) == READ_AT_ONCE

    def whole_lines(self) -> "Chunk":
        """The same without a last line that is not whole; the position is before that line.

        A line that is longer than what is read at once is given in parts.
        """
        data = _whole_lines(self.data)
        if self.is_full and not data:
            return self
        torn_size = len(self.data) - len(data)
        offset = self.after.offset - torn_size
        after = Position(self.after.attempt, offset)
        return Chunk(data, after, self.sealed)


ChunkSource = Callable[[Position], Iterable[Chunk]]  # what was appended to some file since a position


class Follower:
    """Follows an appended file over all attempts of a run as it grows; gives every byte that counts once."""

    def __init__(self) -> None:
        self.since = Position()  # the next chunks are to be those from here on

    def take(self, chunks: Iterable[Chunk], torn: bool = False) -> Iterator[tuple[int, bytes]]:
        """Yield what is new as (attempt, bytes): whole lines; a torn line too with `torn`, or once sealed."""
        for chunk in chunks:
            if not torn and not chunk.sealed:
                chunk = chunk.whole_lines()
            self.since = chunk.after
            yield chunk.after.attempt, chunk.data


def read_from(run_dir: Path, file: str, since: Position) -> Iterator[Chunk]:
    """What was appended to a file since a position: one chunk for each attempt that has the file, oldest first.

    It ends with the first attempt that is not sealed: nothing of its successors is given before it is known how much
    of its own counts. It ends with a full chunk too, and who wants more asks again.
    """
    for slot in slots(run_dir):
        path = slot.folder / file
        if slot.number < since.attempt or not _exists(path):
            continue
        offset = 0
        if slot.number == since.attempt:
            offset = since.offset
        seal = sealed_size(slot, file)
        stop = offset + READ_AT_ONCE
        if seal is not None:
            stop = min(stop, seal)
        data = _read_range(path, offset, stop)
        after = Position(slot.number, offset + len(data))
        chunk = Chunk(data, after, sealed=seal is not None and len(data) < READ_AT_ONCE)
        yield chunk
        if not chunk.sealed:
            return


def appended_files(run_dir: Path) -> list[str]:
    """The files that attempts of a run append to, relative to their folders."""
    files: set[str] = set()
    for slot in slots(run_dir):
        files.update(slot.appended())
    return sorted(files)


def read_lines(attempt: Attempt, file: str) -> list[Record]:
    """The records of an appended file, up to its seal; a torn last line is dropped."""
    data = read_beginning(attempt, file)
    return parse_lines(data, file)


def read_beginning(
    attempt: Attempt, file: str, size: int | None = None, later: Sequence[Attempt] | None = None
) -> bytes:
    """The first bytes of a file that count: all, or as many as `size`; nothing where there is no such file.

    `later`: as for `sealed_size`.
    """
    path = attempt.folder / file
    if not _exists(path):
        return b""
    stop = sealed_size(attempt, file, later)
    if size is not None and (stop is None or size < stop):
        stop = size
    return _read_range(path, 0, stop)


def read_ending(attempt: Attempt, file: str, size: int, later: Sequence[Attempt] | None = None) -> bytes:
    """The last `size` bytes of a file that count; nothing where there is no such file.

    `later`: as for `sealed_size`.
    """
    path = attempt.folder / file
    if not _exists(path):
        return b""
    stop = sealed_size(attempt, file, later)
    if stop is None:
        stop = path.stat().st_size
    start = max(0, stop - size)
    return _read_range(path, start, stop)


def parse_lines(data: bytes, file: str) -> list[Record]:
    """The records in whole lines of a file of JSON lines; raises Damaged."""
    shape = EVENT if file == "events.jsonl" else ROW
    whole = _whole_lines(data)
    lines = whole.split(b"\n")
    return [_parse_line(line, file, shape) for line in lines if line]


def _parse_line(line: bytes, file: str, shape: FileShape) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file}: a line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Damaged(f"{file}: a line holds {type(record).__name__}; allowed: an object")
    flaw = flaw_of(record, shape)
    if flaw:
        raise Damaged(f"{file}: in a line: {flaw}")
    return record


def sealed_size(attempt: Attempt, file: str, later: Sequence[Attempt] | None = None) -> int | None:
    """How many bytes of an appended file count; None while no later slot (a closing one, too) has sealed it.

    `later`: the slots behind this one, oldest first, where the caller has just listed them.
    """
    if later is None:
        later = slots_behind(attempt, slots(attempt.run_dir))
    for slot in later:
        seal = read_seal(slot.folder, attempt.number, file)
        if seal is not None:
            return seal
    return None


def slots_behind(attempt: Attempt, taken: Iterable[Attempt]) -> list[Attempt]:
    """Those of some slots that were taken after an attempt."""
    behind = []
    for slot in taken:
        if slot.number > attempt.number:
            behind.append(slot)
    return behind


def _whole_lines(data: bytes) -> bytes:
    end = data.rfind(b"\n") + 1
    return data[:end]


def _exists(path: Path) -> bool:
    names = list_names(path.parent)
    return path.name in names


def _read_range(path: Path, start: int, stop: int | None) -> bytes:
    """The bytes of a file from `start` to `stop`, or to its end where that comes first; raises Damaged."""
    try:
        with path.open("rb") as stream:
            end = os.fstat(stream.fileno()).st_size
            if stop is not None:
                end = min(end, stop)
            stream.seek(start)
            return stream.read(max(end - start, 0))
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{path}: {error.strerror}") from None
