"""RUN_DIR/secrets.json: what a run needs and nobody else may read, by name (mode 0600). No other file has secrets."""

from collections.abc import Mapping
from pathlib import Path

from runfolder.files import list_names, read_json, write_json

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
    return read_json(run_dir / _SECRETS_FILE)
