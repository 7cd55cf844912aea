"""RUN_DIR/tracked.json: that MLflow has all of a closed run."""

from pathlib import Path

from runfolder.chain import last_slot
from runfolder.files import list_names, read_json, write_json

_TRACKED_FILE = "tracked.json"


def note_delivered(run_dir: Path, mlflow_run_id: str | None) -> None:
    """Say that MLflow has all of a run up to its newest slot, which closes it."""
    newest = last_slot(run_dir)
    record = {"slot": newest, "mlflow_run_id": mlflow_run_id}
    write_json(run_dir / _TRACKED_FILE, record)


def is_delivered(run_dir: Path) -> bool:
    """Whether MLflow has all of a closed run; what came before it was reopened does not count."""
    if _TRACKED_FILE not in list_names(run_dir):
        return False
    delivered = read_json(run_dir / _TRACKED_FILE)
    return bool(delivered["slot"] == last_slot(run_dir))
