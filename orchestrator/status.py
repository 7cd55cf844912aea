"""Where runs stand: what their folders say, joined with what their cluster says."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from clusters.base import ClusterStatus, Standing, Unreachable
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.runs import Handle, by_age, find, handles, name_of
from orchestrator.tracking.trouble import trouble_in
from runfolder.activity import Activity, silent_since
from runfolder.figures import Figures
from runfolder.mirror import Mirror
from runfolder.snapshot import Snapshot

RunState = Literal["queued", "starting", "running", "preempted", "succeeded", "failed", "cancelled", "unknown"]
ENDED = ("succeeded", "failed", "cancelled")
_LONGEST_DELIVERY_S = 900.0  # seconds; a controller stays for less after the end of its run


@dataclass(frozen=True)
class Status:
    """One run. `step` is the last one of the newest attempt; `steps` is None until it is known.

    `submitted` and `looked_at` (when its folder was read) are by the clock of its cluster.
    `stuck`: its cluster tries again and again, but somebody has to fix what `reason` says.
    `tracking`: why MLflow has not got all that it could have, and how to fix it. `data`: what the trainer counted of
    its rows: how many, how many examples they made, how many of these were cut (truncated) or left out (dropped), ...
    `evidence`: the log line that proves the verdict. `figures` are what the run has measured, `loading` the lines of
    Python that load its output; both are for one run alone, not in lists. `remaining_s`: until the last step, for one
    that is running; in 9 of 10 runs it is in `remaining_range_s`, which is known after 20 steps. `activity`: what it
    does now and since when, by the clock of its cluster. `address`: where a service answers, on its cluster. `stage`:
    of a job of stages the newest one, whose step, attempt and output are told: {name, number, of, run_id, run_dir}.
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
    looked_at: float
    stuck: bool = False
    tracking: str | None = None
    data: dict[str, Any] | None = None
    evidence: str | None = None
    figures: Figures | None = None
    remaining_s: float | None = None
    remaining_range_s: tuple[float, float] | None = None
    activity: Activity | None = None
    loading: tuple[str, ...] = ()
    address: str | None = None
    stage: dict[str, Any] | None = None

    @property
    def shown_state(self) -> str:
        """The state as people read it, which says of a cancelled run that it was paused."""
        if self.state == "cancelled" and self.verdict == "paused":
            return "cancelled (paused)"
        return self.state

    def dump(self) -> dict[str, Any]:
        """The status as plain data, for JSON."""
        return asdict(self)


def status(reference: str, cluster: str | None = None) -> Status:
    """The status of one run, with what it has measured; raises InputError where there is none."""
    run = find(reference, cluster)
    return statuses([run], in_full=True)[0]


def list_runs(cluster: str | None = None) -> list[Status]:
    """The status of the runs of a cluster, or of all that this machine has or knows of; newest first."""
    if cluster is None:
        return statuses(reversed(handles()))
    standings = open_cluster(cluster).look()
    newest_first = []
    for run_id in reversed(by_age(standings)):
        standing = standings[run_id]
        newest_first.append(join_status(standing))
    return newest_first


def statuses(runs: Iterable[Handle], in_full: bool = False) -> list[Status]:
    """The status of runs, with one look at each cluster; what they have measured is in full ones alone."""
    wanted = list(runs)
    by_cluster: dict[str, list[Handle]] = {}
    for run in wanted:
        its_runs = by_cluster.setdefault(run.cluster_name, [])
        its_runs.append(run)
    by_run: dict[Handle, Status] = {}
    for cluster_name, its_runs in by_cluster.items():
        by_run |= _statuses_on(cluster_name, its_runs, in_full)
    return [by_run[run] for run in wanted]


def _statuses_on(cluster_name: str, runs: list[Handle], in_full: bool) -> dict[Handle, Status]:
    """How the runs of one cluster stand: what their folders say, joined with what the cluster says."""
    run_ids = [run.run_id for run in runs]
    standings: dict[str, Standing] = {}
    why_unknown = "its folder is not there"
    try:
        standings = open_cluster(cluster_name).look(run_ids, in_full)
    except (Unreachable, InputError) as error:
        why_unknown = str(error)
    unknown = ClusterStatus("unknown", why_unknown)
    mirror = Mirror.of_cluster(cluster_name)
    by_run = {}
    for run in runs:
        no_folder = Snapshot(run.run_id, "", cluster_name, damaged=why_unknown)
        standing = standings.get(run.run_id, Standing(no_folder, unknown))
        if standing.folder.mlflow is None:
            folder = replace(standing.folder, mlflow=mirror.mlflow_run(run.run_id))
            standing = Standing(folder, standing.on_cluster)
        by_run[run] = join_status(standing)
    return by_run


def join_status(standing: Standing) -> Status:
    """What a folder says and what its cluster says, as one; a pure function."""
    run, on_cluster = standing.folder, standing.on_cluster
    state, reason = _state_and_reason(run, on_cluster)
    has_output = run.has_output or state == "succeeded"
    verdict = run.verdict or {}
    output_of = run.stage["run_dir"] if run.stage else run.run_dir
    remaining_s = within = None
    if state == "running":
        remaining_s, within = _remaining(run)
    tracking = None
    if run.undelivered:
        tracking = str(trouble_in(run.undelivered))
    return Status(
        run_id=run.run_id,
        name=name_of(run.run_id),
        cluster=run.cluster or "unknown",
        state=state,
        reason=reason or None,
        step=run.step,
        steps=run.steps,
        attempt=run.attempt,
        verdict=verdict.get("kind"),
        mlflow_run_id=run.mlflow["mlflow_run_id"] if run.mlflow else None,
        run_dir=run.run_dir,
        output_dir=f"{output_of}/output" if has_output else None,
        submitted=run.submitted,
        looked_at=run.looked_at,
        stuck=run.result is None and on_cluster.stuck,
        tracking=tracking,
        data=run.data,
        evidence=verdict.get("evidence"),
        figures=run.figures,
        remaining_s=remaining_s,
        remaining_range_s=within,
        activity=_current_activity(run, state),
        loading=run.loading,
        address=run.address or on_cluster.address,
        stage=run.stage,
    )


def _current_activity(run: Snapshot, state: RunState) -> Activity | None:
    """What a run does now; of one that has ended what follows its end."""
    if state in ("starting", "running"):
        return run.activity
    if run.closed is None or run.attempt == 0 or run.delivered or run.undelivered:
        return None
    doing = "delivering to MLflow"
    if run.looked_at - run.closed > _LONGEST_DELIVERY_S:
        doing = "not all of it is in MLflow, and nobody delivers it: fleetune compare does"
    return Activity(doing, run.closed, run.closed)


def _remaining(run: Snapshot) -> tuple[float | None, tuple[float, float] | None]:
    """Seconds until the last step, and the range that they are in; None where that is not known."""
    figures = run.figures
    if run.steps is None or figures is None:
        return None, None
    if silent_since(run.activity, figures.seconds_per_step, run.looked_at) is not None:
        return None, None  # it takes no steps, so that the pace of earlier ones says nothing
    if figures.pace is not None:
        remaining = figures.pace.remaining(run.step, run.steps)
        return remaining.likely, (remaining.low, remaining.high)
    if figures.seconds_per_step is None:
        return None, None
    steps_left = run.steps - run.step
    return steps_left * figures.seconds_per_step, None


def _state_and_reason(run: Snapshot, on_cluster: ClusterStatus) -> tuple[RunState, str | None]:
    """The state, and why: a run that had an attempt and waits for the next one is preempted."""
    if run.damaged:
        return "unknown", run.damaged
    if run.result:
        return run.result["state"], run.result.get("reason")
    hindrance = run.hindrance or {}
    reasons = [on_cluster.reason, hindrance.get("why")]
    if on_cluster.state in ("unknown", "ended"):
        reason = "; ".join(filter(None, reasons))
        return "unknown", reason or "the run has ended, and its result is not there yet"
    reasons.append(run.asked)
    reason = "; ".join(filter(None, reasons))
    if on_cluster.address:
        return "running", reason
    if run.attempt == 0:
        if on_cluster.state == "queued":
            return "queued", reason
        return "starting", reason
    verdict = run.verdict or {}
    has_failed = bool(verdict) and verdict["kind"] != "success"
    if has_failed or on_cluster.state != "running":
        return "preempted", reason or verdict.get("reason")
    if run.left:
        return "preempted", reason or f"attempt {run.attempt} ended without a verdict, and the next one begins"
    if run.begun:
        return "running", reason
    return "starting", reason
