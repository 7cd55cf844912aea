"""How a run stands, as its folder tells it at one point in time: plain data that goes through JSON and back.

This is the way by which everybody looks at a run that is not theirs: `list` and `status`, the far side, backends, the
supervisor, `compare`. It never raises: whatever is wrong with a folder makes that one run `damaged`, and holds up no
other.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runfolder.activity import Activity, activity_of
from runfolder.appended import parse_lines, read_beginning, read_ending, slots_behind
from runfolder.chain import Attempt, newest_attempt, result, settle, slots
from runfolder.costs import Costs, read_costs
from runfolder.delivered import is_delivered
from runfolder.figures import Figures, read_figures
from runfolder.files import Damaged, Record, list_names, read_json
from runfolder.hindrance import hindrance
from runfolder.latest_start import is_left
from runfolder.loading import loading_lines
from runfolder.record import read_brief
from runfolder.requests import cancel_requested, pause_step
from runfolder.shapes import MLFLOW_RUN, UNDELIVERED, VERDICT, FileShape
from runfolder.stages import newest_stage

ASKED_TO_END = "asked to end"
# Fields of a job of stages that are those of its newest one.
_TOLD_BY_STAGE = (
    *("steps", "attempt", "step", "begun", "verdict", "left", "has_output"),
    *("data", "hindrance", "damaged", "activity", "figures", "loading"),
)
_METRICS_TAIL_BYTES = 1 << 14  # bytes at the end of metrics.jsonl that hold its last whole line
_EVENTS_HEAD_BYTES = 1 << 16  # bytes at the start of events.jsonl that hold the plan
_EVENTS_TAIL_BYTES = 1 << 14  # bytes at the end of events.jsonl that say what is being done


@dataclass(frozen=True)
class Snapshot:
    """One run. Where `damaged` says why its folder cannot be read, in one line, nothing else is known.

    `steps` is None until it is known. `attempt` is the number of the newest attempt, 0 before the first; `step`,
    `begun` (whether it has reported a step), `verdict` and `left` (whether it is over without one) are that
    attempt's. `result` is the final word, of the time `closed`. `activity` is what a run that goes on does now.
    `mlflow` says which MLflow run it has, `delivered` whether that has all of a closed run, `undelivered` what holds
    its rows up, `data` what the trainer counted of its rows, `asked` what somebody asked of a run that has not ended,
    `cancelled` whether that is to end, and `hindrance` what keeps its starts from an attempt. `address` is where a
    service answers. `looked_at` is when this was read, by the clock of the machine that has the folder, as all times
    are. What costs more to read is there in full views alone: its figures, the lines of Python that load its output,
    and its costs. `stage` is the newest one of a job of stages: {name, number, of, run_id, run_dir}, whose attempts
    and steps are told as the run's. `stage_of` is the run that this one is a stage of.
    """

    run_id: str
    run_dir: str
    cluster: str | None = None
    submitted: float = 0.0
    looked_at: float = 0.0
    steps: int | None = None
    attempt: int = 0
    step: int = 0
    begun: bool = False
    verdict: Record | None = None
    left: bool = False
    result: Record | None = None
    closed: float | None = None
    has_output: bool = False
    mlflow: Record | None = None
    delivered: bool = False
    undelivered: Record | None = None
    data: Record | None = None
    asked: str | None = None
    cancelled: bool = False
    hindrance: Record | None = None
    damaged: str | None = None
    activity: Activity | None = None
    figures: Figures | None = None
    loading: tuple[str, ...] = ()
    costs: Costs | None = None
    address: str | None = None
    stage: Record | None = None
    stage_of: str | None = None

    def dump(self) -> dict[str, Any]:
        """The snapshot as plain data, which JSON can hold."""
        plain = dict(vars(self))
        if self.figures is not None:
            plain["figures"] = asdict(self.figures)
        if self.activity is not None:
            plain["activity"] = asdict(self.activity)
        if self.costs is not None:
            plain["costs"] = asdict(self.costs)
        return plain

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> "Snapshot":
        """From what `dump` gave, also as it comes out of JSON."""
        figures = plain["figures"]
        if figures is not None:
            figures = Figures.load(figures)
        activity = plain["activity"]
        if activity is not None:
            activity = Activity(**activity)
        costs = plain["costs"]
        if costs is not None:
            costs = Costs(**costs)
        loading = tuple(plain["loading"])
        loaded = {"figures": figures, "activity": activity, "loading": loading, "costs": costs}
        return cls(**{**plain, **loaded})


def snapshot(run_dir: Path, in_full: bool = False) -> Snapshot:
    """How a run stands now, with its figures where the view is to be full; a damaged one is told as that."""
    try:
        glance = _read_snapshot(run_dir)
        if glance.stage is not None:
            return _with_stage(glance, in_full)
        return _with_figures(glance) if in_full else glance
    except Exception as error:  # a bug of ours included: other runs are looked at in the same breath
        words = " ".join(str(error).split())
        kind = "" if isinstance(error, Damaged) else f"{type(error).__name__}: "
        where = "" if str(run_dir) in words else f"{run_dir}: "
        return Snapshot(run_dir.name, str(run_dir), damaged=f"{where}{kind}{words}")


def has_ended(run_dir: Path) -> bool:
    """Whether a run has its final word; one that is damaged has none, as its snapshot says."""
    try:
        return result(run_dir) is not None
    except (Damaged, OSError):
        return False


def _pending_request(run_dir: Path, cancelled: bool) -> str | None:
    """What somebody asked of a run, in words."""
    if cancelled:
        return ASKED_TO_END
    pause = pause_step(run_dir)
    if pause is None:
        return None
    return f"asked to pause after step {pause}"


def read_plan(attempt: Attempt, later: Sequence[Attempt] | None = None) -> Record:
    """What the trainer announced at the start of an attempt: steps, parameters, ...; empty while it has not.

    `later`: the slots behind it, where the caller has just listed them.
    """
    file = "events.jsonl"
    data = read_beginning(attempt, file, _EVENTS_HEAD_BYTES, later)
    for event in parse_lines(data, file):
        if event["event"] == "plan":
            event.pop("event")
            event.pop("time", None)
            return event
    return {}


def _read_snapshot(run_dir: Path) -> Snapshot:
    taken = slots(run_dir)
    files = list_names(run_dir)  # after the slots: what a closing one promises is there, or still to be moved
    brief = read_brief(run_dir, files)
    newest = newest_attempt(run_dir, taken)
    later = slots_behind(newest, taken)
    attempt_files = list_names(newest.folder)
    plan = read_plan(newest, later) if "events.jsonl" in attempt_files else {}
    row = _last_row(newest, later, attempt_files)
    steps = plan.get("steps") or brief["steps"]
    verdict = _read_listed(newest.folder, "verdict.json", attempt_files, VERDICT)
    ended = _final_result(taken[-1], files) if taken else None
    cancelled = ended is None and "requests" in files and cancel_requested(run_dir)
    is_live = ended is None and verdict is None and not later
    activity, address = _read_activity(newest, attempt_files if is_live else [], row, steps)
    return Snapshot(
        run_id=run_dir.name,
        run_dir=str(run_dir),
        cluster=brief["cluster"],
        submitted=brief["submitted"],
        looked_at=time.time(),
        steps=steps,
        attempt=newest.number,
        step=int(row["step"]) if row else _first_step(newest),
        begun="metrics.jsonl" in attempt_files or address is not None,
        verdict=verdict,
        left=is_live and is_left(newest, files),
        result=ended,
        closed=taken[-1].claim["time"] if ended else None,
        has_output="output" in files,
        **_in_mlflow(run_dir, files, ended is not None),
        data=plan.get("data"),
        asked=_pending_request(run_dir, cancelled) if ended is None and "requests" in files else None,
        cancelled=cancelled,
        hindrance=hindrance(run_dir) if ended is None and "hindered.json" in files else None,
        activity=activity,
        address=address,
        stage=newest_stage(run_dir, brief.get("stages", [])),
        stage_of=brief.get("stage_of"),
    )


def _in_mlflow(run_dir: Path, files: Sequence[str], is_closed: bool) -> dict[str, Any]:
    """Which MLflow run a run has, whether that has all of it, and what holds its rows up."""
    return {
        "delivered": is_closed and is_delivered(run_dir),
        "mlflow": _read_listed(run_dir, "mlflow.json", files, MLFLOW_RUN),
        "undelivered": _read_listed(run_dir, "undelivered.json", files, UNDELIVERED),
    }


def _with_stage(run: Snapshot, in_full: bool) -> Snapshot:
    """A job of stages with what its newest one says of itself."""
    assert run.stage is not None
    folder = Path(run.stage["run_dir"])
    if not folder.exists():
        return run
    stage = snapshot(folder, in_full)
    told = {field: getattr(stage, field) for field in _TOLD_BY_STAGE}
    return replace(run, **told)


def _with_figures(run: Snapshot) -> Snapshot:
    """The full view of a run: it reads all of its rows."""
    run_dir = Path(run.run_dir)
    figures = read_figures(run_dir, run.submitted, run.activity, run.left)
    loading = loading_lines(run_dir)
    costs = read_costs(run_dir)
    return replace(run, figures=figures, loading=tuple(loading), costs=costs)


def _read_listed(folder: Path, file: str, listing: Sequence[str], shape: FileShape) -> Record | None:
    """The JSON file of a folder; None where the folder's listing does not have it."""
    if file not in listing:
        return None
    return read_json(folder / file, shape)


def _final_result(newest: Attempt, files: Sequence[str]) -> Record | None:
    """The final word. Whoever closed the run may have died before the output was in its place: move it then."""
    if newest.kind != "close":
        return None
    ended: Record = newest.claim["result"]
    if ended["state"] == "succeeded" and "result.json" not in files:
        with suppress(PermissionError):
            return settle(newest.run_dir)
        return None  # the run of somebody else, who will do it
    return ended


def _last_row(attempt: Attempt, later: Sequence[Attempt], files: Sequence[str]) -> Record | None:
    """The last row of an attempt with these files, of a step or an evaluation; None before it is whole."""
    if "metrics.jsonl" not in files:
        return None
    tail = read_ending(attempt, "metrics.jsonl", _METRICS_TAIL_BYTES, later)
    whole_lines = tail[: tail.rfind(b"\n") + 1]
    last_line = whole_lines[whole_lines.rfind(b"\n", 0, -1) + 1 :]
    for row in parse_lines(last_line, "metrics.jsonl"):
        return row
    return None


def _first_step(attempt: Attempt) -> int:
    """The step that an attempt starts from."""
    if attempt.number == 0:
        return 0
    start = attempt.start
    if start is None:
        return 0
    return start.step


def _read_activity(
    attempt: Attempt, files: Sequence[str], row: Record | None, steps: int | None
) -> tuple[Activity | None, str | None]:
    """What the newest attempt does now, and where it answers if it serves; `files` are those of its folder."""
    if "events.jsonl" not in files:
        return None, None
    events = _newest_events(attempt)
    alive = 0.0
    if "alive" in files:
        alive = (attempt.folder / "alive").stat().st_mtime
    return activity_of(events, row, steps, alive), _address_in(events)


def _newest_events(attempt: Attempt) -> list[Record]:
    """The last events of an attempt, the oldest first."""
    tail = read_ending(attempt, "events.jsonl", _EVENTS_TAIL_BYTES, [])
    if len(tail) == _EVENTS_TAIL_BYTES:
        _, _, tail = tail.partition(b"\n")  # the end of a line
    return list(parse_lines(tail, "events.jsonl"))


def _address_in(events: Sequence[Record]) -> str | None:
    """Where the attempt at a service answers, if it does."""
    for event in reversed(events):
        if event["event"] == "serving":
            return str(event["address"])
    return None
