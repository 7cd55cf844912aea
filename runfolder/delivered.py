"""RUN_DIR/tracked.json: that MLflow has all of a closed run, or that nobody there is to wait until it has."""

from pathlib import Path

from runfolder.chain import last_slot
from runfolder.files import list_names, read_json, write_json
from runfolder.shapes import TRACKED

_TRACKED_FILE = "tracked.json"


def note_delivered(run_dir: Path, mlflow_run_id: str | None) -> None:
    """Say that MLflow has all of a run up to its newest slot, which closes it.

    Without an id: that the run is left to whoever compares, on another machine.
    """
    newest = last_slot(run_dir)
    record = {"slot": newest, "mlflow_run_id": mlflow_run_id}
    write_json(run_dir / _TRACKED_FILE, record)


def is_delivered(run_dir: Path) -> bool:
    """Whether nobody has to deliver of a closed run any more; what came before it was reopened does not count."""
    if _TRACKED_FILE not in list_names(run_dir):
        return False
    delivered = read_json(run_dir / _TRACKED_FILE, TRACKED)
    return bool(delivered["slot"] == last_slot(run_dir))


def tracked_run(run_dir: Path) -> str | None:
    """The MLflow run that has all of a closed run; None where none has yet."""
    if not is_delivered(run_dir):
        return None
    mlflow_run_id: str | None = read_json(run_dir / _TRACKED_FILE, TRACKED).get("mlflow_run_id")
    return mlflow_run_id
