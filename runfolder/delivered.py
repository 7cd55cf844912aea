"""RUN_DIR/tracked.json: that MLflow has all of a closed run."""

from pathlib import Path

from runfolder.chain import last_slot
from runfolder.files import names, read_json, write_json

_FILE = "tracked.json"


def note_delivered(run_dir: Path, mlflow_run_id: str | None) -> None:
    """Say that MLflow has all of a run up to its newest slot, which closes it."""
    write_json(run_dir / _FILE, {"slot": last_slot(run_dir), "mlflow_run_id": mlflow_run_id})


def is_delivered(run_dir: Path) -> bool:
    """Whether MLflow has all of a closed run; what came before it was reopened does not count."""
    return _FILE in names(run_dir) and bool(read_json(run_dir / _FILE)["slot"] == last_slot(run_dir))
