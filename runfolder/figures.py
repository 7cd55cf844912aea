"""What a run has measured so far: its speed, its evaluations, its memory, and where its time went."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from statistics import median

from runfolder.activity import Activity, silent_since
from runfolder.appended import read_lines
from runfolder.chain import Attempt, slots
from runfolder.cooling import COOLED_LOSS
from runfolder.files import Record, list_names
from runfolder.goodput import Goodput, SlotTimes, StepTime, goodput
from runfolder.pace import Pace, read_pace

_RECENT = 100  # steps that the speed is taken from


@dataclass(frozen=True)
class Figures:
    """Figures of a run over all its attempts; None where nothing is known yet.

    `tokens_per_second` is the median that the newest steps reported, `seconds_per_step` what they took with the
    evaluations and saves between them; both are of the newest attempt, like its pace and the time since its last
    step. An evaluation is {step, and each `eval_` metric}. The memory is that of rank 0.
    """

    goodput: Goodput
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    since_last_step_s: float | None = None
    peak_memory_bytes: int | None = None
    last_evaluation: Record | None = None
    best_evaluation: Record | None = None
    pace: Pace | None = None

    @classmethod
    def load(cls, plain: Record) -> "Figures":
        """From its fields as plain data, as they come out of JSON."""
        goodput = Goodput(**plain["goodput"])
        pace = plain["pace"]
        if pace is not None:
            pace = Pace(**pace)
        return cls(**{**plain, "goodput": goodput, "pace": pace})


def read_figures(run_dir: Path, submitted: float, activity: Activity | None = None, left: bool = False) -> Figures:
    """The figures of a run now; it reads all of its rows.

    `activity`: what its newest attempt does; `left`: whether that is over without a verdict.
    """
    times: list[SlotTimes] = []
    rows: list[Record] = []
    newest: list[Record] = []
    starts = _job_starts(run_dir)
    before = 0.0
    attempt = None
    for slot in slots(run_dir):
        of_slot = []
        if slot.kind == "attempt":
            of_slot = read_lines(slot, "metrics.jsonl")
            newest = of_slot
            attempt = slot
            rows.extend(of_slot)
        of_times = _times(slot, of_slot)
        granted = _last_between(before, of_times.taken, starts)
        times.append(replace(of_times, granted=granted))
        before = of_times.taken
    now = time.time()
    figures = figures_of(Goodput(), rows, newest, now)
    if times:
        silent = silent_since(activity, figures.seconds_per_step, now)
        times[-1] = replace(times[-1], left=left, silent_since=silent)
    spent = goodput(submitted, times, now)
    pace = read_pace(attempt, newest) if attempt else None
    return replace(figures, goodput=spent, pace=pace)


def figures_of(spent: Goodput, rows: Iterable[Record], newest: Iterable[Record], now: float) -> Figures:
    """The figures of a run from the rows of all attempts, and those of the newest one; a pure function."""
    evaluations = [_eval_metrics(row) for row in rows if _is_evaluation(row)]
    last = None
    if evaluations:
        last = evaluations[-1]
    best = max(evaluations, key=_merit, default=None)
    steps = list(filter(_is_step, newest))
    recent = steps[-_RECENT:]
    if not recent:
        return Figures(spent, last_evaluation=last, best_evaluation=best)
    silent_s = now - recent[-1]["time"]
    return Figures(
        spent,
        _median_of(recent, "tokens_per_second"),
        _seconds_per_step(recent),
        max(0.0, silent_s),
        recent[-1].get("peak_memory_bytes"),
        last,
        best,
    )


def _last_between(begin: float, end: float, sorted_times: Iterable[float]) -> float | None:
    """The last of some times that is between two; None where none is."""
    last = None
    for timestamp in sorted_times:
        if begin < timestamp < end:
            last = timestamp
    return last


def _job_starts(run_dir: Path) -> list[float]:
    """When batch jobs of a run began, each of which leaves a file; oldest first."""
    starts = []
    folder = run_dir / "starts"
    for name in list_names(folder):
        status = (folder / name).stat()
        starts.append(status.st_mtime)
    starts.sort()
    return starts


def _times(slot: Attempt, rows: Sequence[Record]) -> SlotTimes:
    """When a slot was taken, and what its rows and its verdict say."""
    taken = slot.claim["time"]
    if not rows:
        return SlotTimes(slot.kind, taken, verdict=slot.verdict)
    steps = []
    for row in filter(_is_step, rows):
        step = StepTime(row["step"], row["time"])
        steps.append(step)
    last_row = rows[-1]["time"]
    return SlotTimes(slot.kind, taken, steps, last_row, slot.verdict)


def _is_step(row: Record) -> bool:
    """Whether a row is that of an optimizer step, and not of an evaluation."""
    return "loss" in row


def _is_evaluation(row: Record) -> bool:
    """Whether a row is that of an evaluation in training, and not of a branch that was cooled down.

    The rows of a run that evaluates count its answers alone.
    """
    if _is_step(row) or COOLED_LOSS in row:
        return False
    return "answered" not in row


def _eval_metrics(row: Record) -> Record:
    """The step and the metrics of an evaluation's row."""
    metrics = {"step": row["step"]}
    for name, value in row.items():
        if name.startswith("eval_"):
            metrics[name] = value
    return metrics


def _merit(evaluation: Record) -> tuple[float, float]:
    """What makes an evaluation better than others: more exact matches, then less loss."""
    matches = evaluation.get("eval_exact_match", 0.0)
    loss = evaluation.get("eval_loss", inf)
    if isnan(loss):
        loss = inf
    return matches, -loss


def _median_of(rows: Iterable[Record], name: str) -> float | None:
    """The median of a metric over the rows that have it."""
    values = []
    for row in rows:
        value = row.get(name)
        if value is not None:
            values.append(value)
    if not values:
        return None
    return float(median(values))


def _seconds_per_step(steps: Sequence[Record]) -> float | None:
    """What a step took; None before there are two."""
    first = steps[0]
    last = steps[-1]
    number = last["step"] - first["step"]
    if not number:
        return None
    seconds = last["time"] - first["time"]
    return float(seconds / number)
