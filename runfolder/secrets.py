"""What a run needs and nobody else may read: RUN_DIR/secrets.json, of mode 0600. All other files hold no secret."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from runfolder.files import read_json, sync_folder

_FILE = "secrets.json"


def write_secrets(run_dir: Path, secrets: Mapping[str, str]) -> None:
    """Keep secrets by name, for their owner alone; whole or not at all, in place of those before."""
    temporary = run_dir / f".{_FILE}.{uuid.uuid4().hex}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(dict(secrets), stream, indent=1)
        stream.flush()
        os.fsync(descriptor)
    temporary.replace(run_dir / _FILE)
    sync_folder(run_dir)


def read_secrets(run_dir: Path) -> dict[str, str]:
    """The secrets of a run by name; empty where it has none."""
    path = run_dir / _FILE
    return dict(read_json(path)) if path.exists() else {}
