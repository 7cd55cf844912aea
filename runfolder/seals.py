"""The seals of a slot: how many bytes of each appended file of its predecessors count.

`seals.json` is the first file that is written into a slot once it is taken. What a paused predecessor appends later
lies behind the seal, and readers stop there. Seals are handed on from slot to slot: the newest one has all of them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from runfolder.files import list_names, read_json, refresh, write_json
from runfolder.shapes import SEALS

_SEALS_FILE = "seals.json"
_LOGS = "logs"

Seals = dict[str, dict[str, int]]  # bytes of each file, by slot


def appended(folder: Path) -> list[str]:
    """The files that are appended to in an attempt's folder: rows, events, and the logs of its workers."""
    names = list_names(folder)
    if _LOGS in names:
        logs = list_names(folder / _LOGS)
        names += [f"{_LOGS}/{name}" for name in logs]
    files = [name for name in names if name.endswith((".jsonl", ".log"))]
    return sorted(files)


def write_seals(folder: Path, predecessors: Sequence[Path]) -> None:
    """Write down in a slot's folder how many bytes of each appended file in its predecessors' folders count.

    They come oldest first. What was sealed before stays; whoever took the slot before this may have died before that.
    """
    seals: Seals = {}
    for earlier in reversed(predecessors):
        refresh(earlier)
        names = list_names(earlier)
        if _LOGS in names:
            refresh(earlier / _LOGS)
        sizes = {}
        for file in appended(earlier):
            sizes[file] = _size(earlier / file)
        seals[earlier.name] = sizes
        if _SEALS_FILE in names:
            seals |= read_json(earlier / _SEALS_FILE, SEALS)
            break
    write_json(folder / _SEALS_FILE, seals)


def read_seal(folder: Path, number: int, file: str) -> int | None:
    """How many bytes of a file of slot `number` count, as a later slot's folder says; None where it does not say."""
    if _SEALS_FILE not in list_names(folder):
        return None
    seals = read_json(folder / _SEALS_FILE, SEALS)
    sizes = seals.get(str(number))
    if sizes is None:
        return None
    return int(sizes.get(file, 0))


def _size(path: Path) -> int:
    """The size of a file in bytes, as the server has it."""
    # A client of NFS asks the server for the size when a file is opened; without that it may be an old one.
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        return status.st_size
