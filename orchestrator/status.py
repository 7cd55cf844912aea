"""Where runs stand: what their folders say, joined with what their cluster says."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clusters.base import ClusterStatus, Unreachable
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.runs import Handle, find, handles, name_of
from orchestrator.tracking.trouble import parse_trouble
from runfolder.mirror import Mirror
from runfolder.snapshot import Snapshot

RunState = Literal["queued", "starting", "running", "preempted", "succeeded", "failed", "cancelled", "unknown"]
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Status:
    """One run. `step` is the last one of the newest attempt; `steps` is None until it is known.

    `stuck`: its cluster tries again and again, but somebody has to fix what `reason` says.
    `tracking`: why MLflow has not got all that it could have, and how to fix it. `data`: what the trainer counted of
    its rows: how many, how many examples they made, how many of these were cut (truncated) or left out (dropped), ...
    """

    run_id: str
    name: str
    cluster: str
    state: RunState
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
        """The status as plain data, for JSON."""
        return asdict(self)


def status(reference: str, cluster: str | None = None) -> Status:
    """The status of one run; raises InputError where there is none."""
    return statuses([find(reference, cluster)])[0]


def list_runs(cluster: str | None = None) -> list[Status]:
    """The status of the runs of a cluster, or of all that this machine has or knows of; newest first."""
    return statuses(reversed(handles(cluster)))


def statuses(runs: Iterable[Handle]) -> list[Status]:
    """The status of runs, with one look at each cluster."""
    wanted = list(runs)
    by_cluster: dict[str, list[Handle]] = {}
    for run in wanted:
        its_runs = by_cluster.setdefault(run.cluster_name, [])
        its_runs.append(run)
    by_run: dict[Handle, Status] = {}
    for cluster_name, its_runs in by_cluster.items():
        by_run |= _statuses_on(cluster_name, its_runs)
    return [by_run[run] for run in wanted]


def _statuses_on(cluster_name: str, runs: list[Handle]) -> dict[Handle, Status]:
    """How the runs of one cluster stand: what their folders say, joined with what the cluster says."""
    run_ids = [run.run_id for run in runs]
    on_cluster: dict[str, ClusterStatus] = {}
    snapshots: dict[str, Snapshot] = {}
    why_unknown = "its folder is not there"
    try:
        cluster = open_cluster(cluster_name)
        snapshots = cluster.site.snapshots(run_ids)
        on_cluster = cluster.status(run_ids)
    except (Unreachable, InputError) as error:
        why_unknown = str(error)
    unknown = ClusterStatus("unknown", why_unknown)
    mirror = Mirror.of_cluster(cluster_name)
    by_run = {}
    for run in runs:
        no_folder = Snapshot(run.run_id, "", cluster_name, damaged=why_unknown)
        snapshot = snapshots.get(run.run_id, no_folder)
        if snapshot.mlflow is None:
            snapshot = replace(snapshot, mlflow=mirror.mlflow_run(run.run_id))
        cluster_status = on_cluster.get(run.run_id, unknown)
        by_run[run] = join_status(snapshot, cluster_status)
    return by_run


def join_status(run: Snapshot, on_cluster: ClusterStatus) -> Status:
    """What a folder says and what its cluster says, as one; a pure function."""
    state, reason = _state_and_reason(run, on_cluster)
    has_output = run.has_output or state == "succeeded"
    tracking = None
    if run.undelivered:
        trouble = parse_trouble(Path(run.run_dir), run.undelivered)
        tracking = str(trouble)
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
        output_dir=f"{run.run_dir}/output" if has_output else None,
        submitted=run.submitted,
        stuck=run.result is None and on_cluster.stuck,
        tracking=tracking,
        data=run.data,
    )


def _state_and_reason(run: Snapshot, on_cluster: ClusterStatus) -> tuple[RunState, str | None]:
    """The state, and why: a run that had an attempt and waits for the next one is preempted."""
    if run.damaged:
        return "unknown", run.damaged
    if run.result:
        return run.result["state"], run.result.get("reason")
    if on_cluster.state in ("unknown", "ended"):
        return "unknown", on_cluster.reason or "the run has ended, and its result is not there yet"
    reasons = filter(None, [on_cluster.reason, run.asked])
    reason = "; ".join(reasons)
    if run.attempt == 0:
        if on_cluster.state == "queued":
            return "queued", reason
        return "starting", reason
    verdict = run.verdict or {}
    has_failed = bool(verdict) and verdict["kind"] != "success"
    if has_failed or on_cluster.state != "running":
        return "preempted", reason or verdict.get("reason")
    if run.begun:
        return "running", reason
    return "starting", reason
