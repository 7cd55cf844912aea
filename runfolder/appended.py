"""Appended files of attempts (metrics, events, logs), read up to their seals."""

import json
from pathlib import Path

from runfolder.chain import Attempt, slots
from runfolder.files import Record, read_json


def sealed_size(run_dir: Path, attempt: Attempt, file: str) -> int | None:
    """How many bytes of an appended file count; None while no later slot (a closing one, too) has sealed it."""
    for later in slots(run_dir):
        path = later.folder / "seals.json"
        if later.number > attempt.number and path.exists():
            sizes = read_json(path).get(str(attempt.number))
            if sizes is not None:
                return int(sizes.get(file, 0))
    return None


def read_lines(run_dir: Path, attempt: Attempt, file: str) -> list[Record]:
    """The records of an appended file, up to its seal; a torn last line is dropped."""
    path = attempt.folder / file
    if not path.exists():
        return []
    with path.open("rb") as stream:
        data = stream.read(-1 if (size := sealed_size(run_dir, attempt, file)) is None else size)
    whole, _, _torn = data.rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]
