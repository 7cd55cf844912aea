"""Files of a run that are uploaded to MLflow: the job, the result and, of a run that succeeded, the output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.tracking.password import secrets_of
from runfolder.record import load_any_job

_UPLOAD_BYTES = 512 << 20


def upload(client: Any, run_dir: Path, mlflow_run_id: str, succeeded: bool) -> None:
    """Upload job, result and, of a run that succeeded, the output files, small ones first, up to 512 MiB.

    Raises ConnectionError, as stores of artifacts raise what they like.
    """
    try:
        for path, folder in _artifacts(run_dir, succeeded):
            client.log_artifact(mlflow_run_id, str(path), folder)
    except Exception as error:
        raise ConnectionError(f"artifacts: {error}") from error


def _artifacts(run_dir: Path, succeeded: bool) -> Iterator[tuple[Path, str | None]]:
    """Files, and the folders in MLflow that they go to. A job.yaml with a password in it stays here."""
    names = ["result.json"] if secrets_of(load_any_job(run_dir)) else ["job.yaml", "result.json"]
    for name in names:
        path = run_dir / name
        if path.exists():
            yield path, None
    if succeeded:
        yield from _output_files(run_dir / "output")


def _output_files(output: Path) -> Iterator[tuple[Path, str]]:
    files = [path for path in output.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.stat().st_size)
    left = _UPLOAD_BYTES
    for path in files:
        left -= path.stat().st_size
        if left >= 0:
            folder = path.parent.relative_to(output)
            yield path, str("output" / folder)
