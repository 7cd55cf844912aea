"""RUN_DIR/secrets.json: what a run needs and nobody else may read, by name (mode 0600). No other file has secrets."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from runfolder.files import names, sync_folder

_FILE = "secrets.json"


def write_secrets(run_dir: Path, secrets: Mapping[str, str]) -> None:
    """Add to the secrets of a run, in place of older ones of the same names; whole or not at all."""
    if not secrets:
        return
    temporary = run_dir / f".{_FILE}.{uuid.uuid4().hex}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump({**read_secrets(run_dir), **secrets}, stream, indent=1)
        stream.flush()
        os.fsync(descriptor)
    temporary.replace(run_dir / _FILE)
    sync_folder(run_dir)


def read_secrets(run_dir: Path) -> dict[str, str]:
    """The secrets of a run by name; empty where it has none."""
    if _FILE not in names(run_dir):
        return {}
    found: dict[str, str] = json.loads((run_dir / _FILE).read_text())
    return found
