"""RUN_DIR/secrets.json: what a run needs and nobody else may read, by name; a file of its owner alone (mode 0600)."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from runfolder.files import names

_FILE = "secrets.json"


def keep(run_dir: Path, values: Mapping[str, str]) -> None:
    """Add secrets to those of a run; newer values take the place of older ones."""
    if not values:
        return
    temporary = run_dir / f".{_FILE}.{uuid.uuid4().hex}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump({**secrets(run_dir), **values}, stream)
        stream.flush()
        os.fsync(descriptor)
    temporary.replace(run_dir / _FILE)


def secrets(run_dir: Path) -> dict[str, str]:
    """The secrets of a run by name; none where it has none."""
    if _FILE not in names(run_dir):
        return {}
    found: dict[str, str] = json.loads((run_dir / _FILE).read_text())
    return found
