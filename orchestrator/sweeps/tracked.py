"""A sweep in MLflow: one parent run, below which the runs of its trials are. Repeating it changes nothing."""

from collections.abc import Iterable
from typing import Any

from orchestrator.comparison.run import TrackedRun
from orchestrator.sweeps.spec import Sweep
from orchestrator.tracking.store import PARENT_TAG

SWEEP_TAG = "fleetune.sweep"
_NAME_TAG = "mlflow.runName"


def gather(mlflow: Any, sweep: Sweep, digest: str, runs: Iterable[TrackedRun], verdict: str | None) -> str | None:
    """Put the runs of a sweep below its parent, which says what the sweep was and found; gives the parent's id."""
    children = list(runs)
    if not children:
        return None
    first = children[0]
    known = mlflow.get_run(first.mlflow_run_id)
    experiment = known.info.experiment_id
    parent = _parent(mlflow, experiment, sweep, digest)
    for run in children:
        if run.tags.get(PARENT_TAG) != parent:
            mlflow.set_tag(run.mlflow_run_id, PARENT_TAG, parent)
            mlflow.set_tag(run.mlflow_run_id, SWEEP_TAG, digest)
    if verdict:
        mlflow.set_tag(parent, "fleetune.verdict", verdict)
    mlflow.set_terminated(parent)
    return parent


def _parent(mlflow: Any, experiment: str, sweep: Sweep, digest: str) -> str:
    """The parent run of a sweep: the oldest one with its digest, else a new one."""
    query = f"tags.`fleetune.sweep_parent` = '{digest}'"
    found = mlflow.search_runs([experiment], query, order_by=["start_time"])
    if found:
        existing: str = found[0].info.run_id
        return existing
    tags = {_NAME_TAG: sweep.name, "fleetune.sweep_parent": digest}
    created = mlflow.create_run(experiment, tags=tags)
    parent: str = created.info.run_id
    for name in ("rule", "budget", "seeds", "measure", "rungs", "keep"):
        value = getattr(sweep, name)
        text = str(value)
        mlflow.log_param(parent, name, text)
    return parent
