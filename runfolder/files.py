"""Files of a run folder: JSON that is written whole or not at all."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Damaged(ValueError):
    """A file of a run folder that is not what it should be: the file and what was found, in one line."""


def read_json(path: Path) -> Record:
    """Read a JSON file that holds an object; raises Damaged."""
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Damaged(f"{path}: found {type(record).__name__}; allowed: an object")
    return record


def write_json(path: Path, record: Record) -> None:
    """Write a JSON file whole or not at all."""
    temporary = _write_beside(path, record)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and creations in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_beside(path: Path, record: Record) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary
