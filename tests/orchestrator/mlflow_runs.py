"""What an MLflow holds of a run."""

from pathlib import Path
from typing import Any

from orchestrator.tracking import store


def runs_of(uri: str | None, run_dir: Path) -> list[Any]:
    """The MLflow runs of a run id."""
    client = store.client(store.resolve(uri))
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, f"tags.`fleetune.run_id` = '{run_dir.name}'"))


def series(uri: str | None, run_dir: Path, key: str = "loss") -> list[tuple[int, float, int]]:
    """Everything that MLflow holds of one metric of the one run of a run id."""
    (run,) = runs_of(uri, run_dir)
    found = store.client(store.resolve(uri)).get_metric_history(run.info.run_id, key)
    return sorted((m.step, m.value, m.timestamp) for m in found)
