"""Where runs stand: what their folders say, joined with what their cluster says."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clusters.base import Status as View
from clusters.base import Unreachable
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.runs import find, name_of, read_record, run_ids, runs_folder
from orchestrator.tracking.history import mlflow_run
from orchestrator.tracking.trouble import held_up
from runfolder.appended import sealed_size
from runfolder.chain import Attempt, last, result, settle
from runfolder.files import Damaged, Record

State = Literal["queued", "starting", "running", "preempted", "succeeded", "failed", "cancelled", "unknown"]
ENDED = ("succeeded", "failed", "cancelled")
_TAIL = 1 << 14  # bytes at the end of metrics.jsonl that hold its last whole line
_HEAD = 1 << 16  # bytes at the start of events.jsonl that hold the plan


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
    return statuses(runs_folder() / run_id for run_id in reversed(run_ids()))


def statuses(run_dirs: Iterable[Path]) -> list[Status]:
    """The status of runs by their folders, with one look at each cluster. A folder that is damaged is `unknown`."""
    records: dict[Path, Mapping[str, Any] | str] = {run_dir: _record(run_dir) for run_dir in run_dirs}
    views = _views({run_dir: record for run_dir, record in records.items() if not isinstance(record, str)})
    return [_status(run_dir, record, views.get(run_dir.name)) for run_dir, record in records.items()]


def _record(run_dir: Path) -> Mapping[str, Any] | str:
    """What was submitted, or why that cannot be read."""
    try:
        return read_record(run_dir)
    except (OSError, Damaged) as error:
        return str(error)


def _status(run_dir: Path, record: Mapping[str, Any] | str, view: View | None) -> Status:
    if isinstance(record, str) or view is None:
        return _unknown(run_dir, str(record))
    try:
        return _join(run_dir, record, view)
    except (OSError, Damaged) as error:
        return _unknown(run_dir, str(error))
    except (LookupError, TypeError, ValueError) as error:
        return _unknown(run_dir, f"{run_dir}: {type(error).__name__}: {error} (is it of another version?)")


def _unknown(run_dir: Path, reason: str) -> Status:
    """A run whose folder does not tell what it should."""
    return Status(
        run_id=run_dir.name,
        name=name_of(run_dir.name),
        cluster="unknown",
        state="unknown",
        reason=reason,
        step=0,
        steps=None,
        attempt=0,
        verdict=None,
        mlflow_run_id=None,
        run_dir=str(run_dir),
        output_dir=None,
        submitted=run_dir.stat().st_mtime,
    )


def _views(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, View]:
    """How the clusters see the runs."""
    views: dict[str, View] = {}
    for cluster in {record["cluster"] for record in records.values()}:
        run_ids = [run_dir.name for run_dir, record in records.items() if record["cluster"] == cluster]
        try:
            views |= open_cluster(cluster).status(run_ids)
        except (Unreachable, InputError) as error:
            views |= {run_id: View("unknown", str(error)) for run_id in run_ids}
    return views


def _join(run_dir: Path, record: Mapping[str, Any], view: View) -> Status:
    ended, newest = _ended(run_dir), last(run_dir)
    claimed = newest.number > 0
    verdict = newest.verdict if claimed else None
    planned = _planned(newest) if claimed else {}
    tracked = mlflow_run(run_dir)
    state, reason = (ended["state"], ended.get("reason")) if ended else _going(newest, verdict, view)
    return Status(
        run_id=run_dir.name,
        name=name_of(run_dir.name),
        cluster=record["cluster"],
        state=state,
        reason=reason or None,
        step=_step(run_dir, newest) if claimed else 0,
        steps=planned.get("steps") or record["job"]["train"]["steps"],
        attempt=newest.number,
        verdict=verdict["kind"] if verdict else None,
        mlflow_run_id=tracked["mlflow_run_id"] if tracked else None,
        run_dir=str(run_dir),
        output_dir=str(run_dir / "output") if state == "succeeded" or (run_dir / "output").exists() else None,
        submitted=record["submitted"],
        stuck=ended is None and view.stuck,
        tracking=str(trouble) if (trouble := held_up(run_dir)) else None,
        data=planned.get("data"),
    )


def _ended(run_dir: Path) -> Record | None:
    """The final word on a run. Whoever closed it may have died before the output was in its place: move it then."""
    ended = result(run_dir)
    if ended and ended["state"] == "succeeded" and not (run_dir / "result.json").exists():
        try:
            return settle(run_dir)
        except PermissionError:
            return None  # the run of somebody else, who will do it
    return ended


def _going(newest: Attempt, verdict: Record | None, view: View) -> tuple[State, str | None]:
    """The state of a run without a result: a run that had an attempt and waits for the next one is preempted."""
    if view.state in ("unknown", "ended"):
        return "unknown", view.reason or "the run has ended, and its result is not there yet"
    if newest.number == 0:
        return ("queued" if view.state == "queued" else "starting"), view.reason
    if (verdict and verdict["kind"] != "success") or view.state != "running":
        return "preempted", view.reason or (verdict or {}).get("reason")
    return ("running" if (newest.folder / "metrics.jsonl").exists() else "starting"), view.reason


def _step(run_dir: Path, attempt: Attempt) -> int:
    """The last step that an attempt reported, else the one that it starts from."""
    path = attempt.folder / "metrics.jsonl"
    start = attempt.start
    if path.exists():
        seal = sealed_size(run_dir, attempt, "metrics.jsonl")
        with path.open("rb") as stream:
            size = path.stat().st_size if seal is None else seal
            stream.seek(max(0, size - _TAIL))
            lines = stream.read(min(size, _TAIL)).rpartition(b"\n")[0].split(b"\n")
        if lines[-1]:
            return int(json.loads(lines[-1])["step"])
    return start.step if start else 0


def _planned(attempt: Attempt) -> Record:
    """What the trainer planned; empty while it has not."""
    path = attempt.folder / "events.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as stream:
        lines = stream.read(_HEAD).rpartition(b"\n")[0].split(b"\n")
    events = (json.loads(line) for line in lines if line)
    return next((event for event in events if event["event"] == "plan"), {})
