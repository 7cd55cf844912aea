"""What an attempt is doing now and since when, as its newest events and its last row tell it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from runfolder.files import Record

_BEGINNINGS = {  # what begins with an event of this kind
    "claimed": "starting the workers",
    "workers_up": "reading the data",
    "loading_base": "loading the base",
    "base_loaded": "preparing the model",
    "plan": "training the first step",
    "asking": "loading the base and the adapters",
    "calibrating": "trying the longest passes",
    "calibrated": "training the first step",
    "cooling_down": "cooling down before the pause, to be judged",
    "exporting": "exporting the output",
    "exported": "checking the output",
    "merging": "merging the adapter into the base",
    "stopped": "ending, as it was asked to",
}

_SILENT_S = 60.0  # without a sign of life, and
_SILENT_STEPS = 10  # times what a step takes: what counts as silence


@dataclass(frozen=True)
class Activity:
    """What is being done, since when, and when something was last written (both in seconds since 1970)."""

    doing: str
    since: float
    moved: float


def silent_since(activity: Activity | None, seconds_per_step: float | None, now: float) -> float | None:
    """Since when nothing was written, where that is far longer than steps take; None where work goes on."""
    if activity is None:
        return None
    steps_s = _SILENT_STEPS * (seconds_per_step or 0.0)
    silent_s = now - activity.moved
    if silent_s <= max(_SILENT_S, steps_s):
        return None
    return activity.moved


def phase_text(event: Record) -> str | None:
    """What begins with an event, or goes on, in words; None where that is nothing."""
    kind = event["event"]
    if kind == "serving":
        return f"serving on {event['address']}"
    if kind != "evaluating":
        return _BEGINNINGS.get(kind)
    return f"evaluating after step {event['step']}: {event['done']:,} of {event['total']:,} {event['what']}"


def activity_of(events: Sequence[Record], row: Record | None, steps: int | None, alive: float) -> Activity | None:
    """What an attempt does, from its newest events and its last row; a pure function.

    `steps`: how many are to be taken. `alive`: when work that writes nothing last showed that it goes on. None where
    nothing is known.
    """
    activity = _newest_phase(events)
    if row is not None and (activity is None or row["time"] >= activity.since):
        activity = _training(row, steps)
    unsaved = _unsaved(events)
    if activity is None:
        return None
    if unsaved is not None:
        activity = _saving(activity, unsaved, steps)
    times = [event.get("time", 0.0) for event in events]
    moved = max(activity.since, alive, *times)
    return replace(activity, moved=moved)


def _newest_phase(events: Iterable[Record]) -> Activity | None:
    """What began last of what begins with an event."""
    newest = None
    for event in events:
        text = phase_text(event)
        if text:
            timestamp: float = event.get("time", 0.0)
            since: float = event.get("began", timestamp)
            newest = Activity(text, since, timestamp)
    return newest


def _training(row: Record, steps: int | None) -> Activity:
    """What follows a row: the next step, or more answers, unless that was the last one."""
    step = row["step"]
    text = f"training step {step + 1:,}"
    if "answered" in row:
        text = "answering questions"
    elif step == steps:
        text = "ending the last step"
    return Activity(text, row["time"], row["time"])


def _unsaved(events: Iterable[Record]) -> Record | None:
    """The event with which a save began that has not ended."""
    unsaved = None
    for event in events:
        if event["event"] == "saving":
            unsaved = event
        elif event["event"] == "checkpoint":
            unsaved = None
    return unsaved


def _saving(activity: Activity, unsaved: Record, steps: int | None) -> Activity:
    """An activity while a save goes on beside it; after the last step it is waited for."""
    step = unsaved["step"]
    if step == steps:
        text = f"saving the checkpoint of step {step:,}"
        since = unsaved.get("time", 0.0)
        return Activity(text, since, since)
    text = f"{activity.doing}, while the checkpoint of step {step:,} is being saved"
    return replace(activity, doing=text)
