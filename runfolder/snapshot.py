"""A run as its folder tells it at one moment: plain data, all that a look at it needs, JSON both ways."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runfolder.appended import beginning, ending, parsed
from runfolder.chain import Attempt, settle, slots
from runfolder.files import Damaged, Record, names, read_json
from runfolder.record import read_brief
from runfolder.requests import cancel_requested, pause_step

_TAIL = 1 << 14  # bytes at the end of metrics.jsonl that hold its last whole line
_HEAD = 1 << 16  # bytes at the start of events.jsonl that hold the plan


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
        """As plain data."""
        return asdict(self)

    @classmethod
    def load(cls, found: Mapping[str, Any]) -> "Snapshot":
        """From what `dump` gave, also as it comes out of JSON."""
        return cls(**found)


def snapshot(run_dir: Path) -> Snapshot:
    """Look at a run."""
    try:
        return _look(run_dir)
    except Damaged as error:
        return Snapshot(run_dir.name, str(run_dir), damaged=str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Snapshot(run_dir.name, str(run_dir), damaged=f"{run_dir}: {type(error).__name__}: {error}")


def _asked(run_dir: Path) -> str | None:
    """What somebody asked of a run, in words."""
    if cancel_requested(run_dir):
        return "asked to end"
    pause = pause_step(run_dir)
    return f"asked to pause after step {pause}" if pause is not None else None


def planned(attempt: Attempt) -> Record:
    """What the trainer announced at the start of an attempt: steps, parameters, ...; empty while it has not."""
    events = parsed(beginning(attempt, "events.jsonl", _HEAD))
    plan = next((event for event in events if event["event"] == "plan"), {})
    return {key: value for key, value in plan.items() if key not in ("event", "time")}


def _look(run_dir: Path) -> Snapshot:
    brief = read_brief(run_dir)
    taken = slots(run_dir)
    newest = next((slot for slot in reversed(taken) if slot.claim["kind"] == "attempt"), Attempt(run_dir, 0))
    there = names(run_dir)
    written = names(newest.folder)
    announced = planned(newest) if "events.jsonl" in written else {}
    begun = "metrics.jsonl" in written
    ended = _ended(taken[-1], there) if taken else None
    return Snapshot(
        run_id=run_dir.name,
        run_dir=str(run_dir),
        cluster=brief["cluster"],
        submitted=brief["submitted"],
        steps=announced.get("steps") or brief["steps"],
        attempt=newest.number,
        step=_step(newest, begun),
        begun=begun,
        verdict=read_json(newest.folder / "verdict.json") if "verdict.json" in written else None,
        result=ended,
        has_output="output" in there,
        mlflow=read_json(run_dir / "mlflow.json") if "mlflow.json" in there else None,
        undelivered=read_json(run_dir / "undelivered.json") if "undelivered.json" in there else None,
        data=announced.get("data"),
        asked=_asked(run_dir) if ended is None and "requests" in there else None,
    )


def _ended(newest: Attempt, there: Sequence[str]) -> Record | None:
    """The final word. Whoever closed the run may have died before the output was in its place: move it then."""
    if newest.claim["kind"] != "close":
        return None
    ended: Record = newest.claim["result"]
    if ended["state"] == "succeeded" and "result.json" not in there:
        with suppress(PermissionError):
            return settle(newest.run_dir)
        return None  # the run of somebody else, who will do it
    return ended


def _step(attempt: Attempt, begun: bool) -> int:
    """The last step that an attempt reported, else the one that it starts from."""
    if begun:
        tail = ending(attempt, "metrics.jsonl", _TAIL)
        whole = tail[: tail.rfind(b"\n") + 1]
        if rows := parsed(whole[whole.rfind(b"\n", 0, -1) + 1 :]):
            return int(rows[0]["step"])
    start = attempt.start if attempt.number else None
    return start.step if start else 0
