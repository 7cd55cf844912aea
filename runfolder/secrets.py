"""RUN_DIR/secrets.json: what a run needs and nobody else may read, by name (mode 0600). No other file has secrets.

On a cluster it is removed when its run has ended, as the machine is others' too.
"""

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from runfolder.chain import result, see_slots
from runfolder.files import list_names, read_json, write_json
from runfolder.shapes import SECRET_VALUES

_SECRETS_FILE = "secrets.json"


def write_secrets(run_dir: Path, secrets: Mapping[str, str]) -> None:
    """Add to the secrets of a run, in place of older ones of the same names; whole or not at all."""
    if secrets:
        merged = {**read_secrets(run_dir), **secrets}
        write_json(run_dir / _SECRETS_FILE, merged, mode=0o600)


def read_secrets(run_dir: Path) -> dict[str, str]:
    """The secrets of a run by name; empty where it has none."""
    if _SECRETS_FILE not in list_names(run_dir):
        return {}
    return read_json(run_dir / _SECRETS_FILE, SECRET_VALUES)


def holds_secrets(run_dir: Path) -> bool:
    """Whether a run has secrets, those included that somebody was about to remove."""
    for name in list_names(run_dir):
        shown_name = name.removeprefix(".")
        if shown_name.startswith(_SECRETS_FILE):
            return True
    return False


def remove_secrets(run_dir: Path) -> None:
    """Remove the secrets of a run that has ended; those of one that was just reopened stay."""
    aside = run_dir / f".{_SECRETS_FILE}-{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):
        (run_dir / _SECRETS_FILE).rename(aside)
    see_slots(run_dir)
    has_ended = result(run_dir) is not None
    for path in run_dir.glob(f".{_SECRETS_FILE}-*"):  # also of one who died in here
        if not has_ended:
            older = read_json(path, SECRET_VALUES)
            write_secrets(run_dir, {**older, **read_secrets(run_dir)})
        path.unlink(missing_ok=True)
