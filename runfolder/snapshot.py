"""How a run stands, as its folder tells it at one point in time: plain data that goes through JSON and back."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runfolder.appended import parse_lines, read_beginning, read_ending
from runfolder.chain import Attempt, newest_attempt, settle, slots
from runfolder.files import Damaged, Record, list_names, read_json
from runfolder.record import read_brief
from runfolder.requests import cancel_requested, pause_step

_METRICS_TAIL_BYTES = 1 << 14  # bytes at the end of metrics.jsonl that hold its last whole line
_EVENTS_HEAD_BYTES = 1 << 16  # bytes at the start of events.jsonl that hold the plan


@dataclass(frozen=True)
class Snapshot:
    """One run. Where `damaged` says why its record cannot be read, nothing else is known.

    `steps` is None until it is known. `attempt` is the number of the newest attempt, 0 before the first; `step`,
    `begun` (whether it has reported a step) and `verdict` are that attempt's. `result` is the final word. `mlflow`
    says which MLflow run it has, `undelivered` what holds its rows up, `data` what the trainer counted of its rows,
    `asked` what somebody asked of a run that has not ended.
    """

    run_id: str
    run_dir: str
    cluster: str | None = None
    submitted: float = 0.0
    steps: int | None = None
    attempt: int = 0
    step: int = 0
    begun: bool = False
    verdict: Record | None = None
    result: Record | None = None
    has_output: bool = False
    mlflow: Record | None = None
    undelivered: Record | None = None
    data: Record | None = None
    asked: str | None = None
    damaged: str | None = None

    def dump(self) -> dict[str, Any]:
        """The snapshot as plain data, which JSON can hold."""
        return asdict(self)

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> "Snapshot":
        """From what `dump` gave, also as it comes out of JSON."""
        return cls(**plain)


def snapshot(run_dir: Path) -> Snapshot:
    """How a run stands now; one that cannot be read is told as damaged."""
    try:
        return _read_snapshot(run_dir)
    except Damaged as error:
        return Snapshot(run_dir.name, str(run_dir), damaged=str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Snapshot(run_dir.name, str(run_dir), damaged=f"{run_dir}: {type(error).__name__}: {error}")


def _pending_request(run_dir: Path) -> str | None:
    """What somebody asked of a run, in words."""
    if cancel_requested(run_dir):
        return "asked to end"
    pause = pause_step(run_dir)
    if pause is None:
        return None
    return f"asked to pause after step {pause}"


def read_plan(attempt: Attempt) -> Record:
    """What the trainer announced at the start of an attempt: steps, parameters, ...; empty while it has not."""
    data = read_beginning(attempt, "events.jsonl", _EVENTS_HEAD_BYTES)
    for event in parse_lines(data):
        if event["event"] == "plan":
            return {key: value for key, value in event.items() if key not in ("event", "time")}
    return {}


def _read_snapshot(run_dir: Path) -> Snapshot:
    brief = read_brief(run_dir)
    taken = slots(run_dir)
    newest = newest_attempt(run_dir, taken)
    files = list_names(run_dir)
    attempt_files = list_names(newest.folder)
    plan = read_plan(newest) if "events.jsonl" in attempt_files else {}
    begun = "metrics.jsonl" in attempt_files
    ended = _final_result(taken[-1], files) if taken else None
    return Snapshot(
        run_id=run_dir.name,
        run_dir=str(run_dir),
        cluster=brief["cluster"],
        submitted=brief["submitted"],
        steps=plan.get("steps") or brief["steps"],
        attempt=newest.number,
        step=_last_step(newest, begun),
        begun=begun,
        verdict=_read_listed(newest.folder, "verdict.json", attempt_files),
        result=ended,
        has_output="output" in files,
        mlflow=_read_listed(run_dir, "mlflow.json", files),
        undelivered=_read_listed(run_dir, "undelivered.json", files),
        data=plan.get("data"),
        asked=_pending_request(run_dir) if ended is None and "requests" in files else None,
    )


def _read_listed(folder: Path, file: str, listing: Sequence[str]) -> Record | None:
    """The JSON file of a folder; None where the folder's listing does not have it."""
    if file not in listing:
        return None
    return read_json(folder / file)


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


def _last_step(attempt: Attempt, begun: bool) -> int:
    """The last step that an attempt reported, else the one that it starts from."""
    if begun:
        tail = read_ending(attempt, "metrics.jsonl", _METRICS_TAIL_BYTES)
        whole_lines = tail[: tail.rfind(b"\n") + 1]
        last_line = whole_lines[whole_lines.rfind(b"\n", 0, -1) + 1 :]
        rows = parse_lines(last_line)
        if rows:
            return int(rows[0]["step"])
    if attempt.number == 0:
        return 0
    start = attempt.start
    if start is None:
        return 0
    return start.step
