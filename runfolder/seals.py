"""The seals of a slot: how many bytes of each appended file of its predecessors count.

`seals.json` is the first file that is written into a slot once it is taken. What a paused predecessor appends later
lies behind the seal, and readers stop there.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from runfolder.files import list_names, read_json, write_json

_SEALS_FILE = "seals.json"


def appended(folder: Path) -> list[str]:
    """The files that are appended to in an attempt's folder: rows, events, and the logs of its workers."""
    logs = [f"logs/{name}" for name in list_names(folder / "logs")]
    files = []
    for file in [*list_names(folder), *logs]:
        if file.endswith((".jsonl", ".log")):
            files.append(file)
    return sorted(files)


def write_seals(folder: Path, predecessors: Iterable[Path]) -> None:
    """Write down in a slot's folder how many bytes of each appended file in its predecessors' folders count."""
    seals: dict[str, dict[str, int]] = {}
    for earlier in predecessors:
        sizes = {}
        for file in appended(earlier):
            sizes[file] = _size(earlier / file)
        seals[earlier.name] = sizes
    write_json(folder / _SEALS_FILE, seals)


def read_seal(folder: Path, number: int, file: str) -> int | None:
    """How many bytes of a file of slot `number` count, as a later slot's folder says; None where it does not say."""
    if _SEALS_FILE not in list_names(folder):
        return None
    seals = read_json(folder / _SEALS_FILE)
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
