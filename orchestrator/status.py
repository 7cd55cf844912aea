"""Where runs stand: what their folders say, joined with what their cluster says."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clusters.base import Status as View
from clusters.base import Unreachable
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.runs import Handle, find, handles, name_of
from orchestrator.tracking.trouble import trouble_of
from runfolder.snapshot import Snapshot

State = Literal["queued", "starting", "running", "preempted", "succeeded", "failed", "cancelled", "unknown"]
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Status:
    """One run. `step` is the last one of the newest attempt; `steps` is None until it is known.

    `stuck`: its cluster tries again and again, but somebody has to mend what `reason` says.
    `tracking`: why MLflow has not got all that it could have, and how to mend it. `data`: what the trainer counted of
    its rows: how many, how many examples they made, how many of these were cut (truncated) or left out (dropped), ...
    """

    run_id: str
    name: str
    cluster: str
    state: State
    reason: str | None
    step: int
    steps: int | None
    attempt: int
    verdict: str | None
    mlflow_run_id: str | None
    run_dir: str
    output_dir: str | None
    submitted: float
    stuck: bool = False
    tracking: str | None = None
    data: dict[str, Any] | None = None

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def status(reference: str) -> Status:
    """The status of one run; raises InputError where there is none."""
    return statuses([find(reference)])[0]


def list_runs() -> list[Status]:
    """The status of every run, newest first."""
    return statuses(reversed(handles()))


def statuses(runs: Iterable[Handle]) -> list[Status]:
    """The status of runs, with one look at each cluster."""
    wanted = list(runs)
    found: dict[Handle, Status] = {}
    for name in dict.fromkeys(run.cluster_name for run in wanted):
        found |= _look(name, [run for run in wanted if run.cluster_name == name])
    return [found[run] for run in wanted]


def _look(cluster_name: str, runs: list[Handle]) -> dict[Handle, Status]:
    """How the runs of one cluster stand: what their folders say, joined with what the cluster says."""
    run_ids = [run.run_id for run in runs]
    views: dict[str, View] = {}
    snapshots: dict[str, Snapshot] = {}
    why = "its folder is not there"
    try:
        cluster = open_cluster(cluster_name)
        snapshots = cluster.site.snapshots(run_ids)
        views = cluster.status(run_ids)
    except (Unreachable, InputError) as error:
        why = str(error)
    nothing = {run_id: Snapshot(run_id, "", cluster_name, damaged=why) for run_id in run_ids}
    found = nothing | snapshots
    return {run: join(found[run.run_id], views.get(run.run_id, View("unknown", why))) for run in runs}


def join(run: Snapshot, view: View) -> Status:
    """What a folder says and what its cluster says, as one; a pure function."""
    state, reason = _state(run, view)
    delivered = run.has_output or state == "succeeded"
    return Status(
        run_id=run.run_id,
        name=name_of(run.run_id),
        cluster=run.cluster or "unknown",
        state=state,
        reason=reason or None,
        step=run.step,
        steps=run.steps,
        attempt=run.attempt,
        verdict=run.verdict["kind"] if run.verdict else None,
        mlflow_run_id=run.mlflow["mlflow_run_id"] if run.mlflow else None,
        run_dir=run.run_dir,
        output_dir=f"{run.run_dir}/output" if delivered else None,
        submitted=run.submitted,
        stuck=run.result is None and view.stuck,
        tracking=str(trouble_of(Path(run.run_dir), run.undelivered)) if run.undelivered else None,
        data=run.data,
    )


def _state(run: Snapshot, view: View) -> tuple[State, str | None]:
    """The state, and why: a run that had an attempt and waits for the next one is preempted."""
    if run.damaged:
        return "unknown", run.damaged
    if run.result:
        return run.result["state"], run.result.get("reason")
    if view.state in ("unknown", "ended"):
        return "unknown", view.reason or "the run has ended, and its result is not there yet"
    why = "; ".join(filter(None, [view.reason, run.asked]))
    if run.attempt == 0:
        return ("queued" if view.state == "queued" else "starting"), why
    if (run.verdict and run.verdict["kind"] != "success") or view.state != "running":
        return "preempted", why or (run.verdict or {}).get("reason")
    return ("running" if run.begun else "starting"), why
