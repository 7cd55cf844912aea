"""How fast a run takes its steps, and from that the time until its last one, in an interval that 9 of 10 runs keep.

The seconds of steps that follow each other are not independent: a slow stretch lasts. So fewer steps count than were
seen: as many as independent ones would say as much of the mean, where the correlation of neighbours decays step by
step (an autoregressive process of order 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import fmean, stdev

from runfolder.appended import read_lines
from runfolder.chain import Attempt
from runfolder.files import Record
from runfolder.quantiles import t_quantile

FIRST_STEPS = 2  # steps at the start of an attempt that are left out: they compile
FEWEST_ROWS = 20  # steps of an attempt from which its remaining time is told as an interval
RECENT = 400  # steps that the pace is taken from
MOST_CORRELATION = 0.9  # more cannot be told from few steps
CAUTION = 1.0  # standard errors by which a correlation is taken to be larger than it looks
LEAST_ERROR = 0.03  # of the remaining time: what changes later cannot be seen in a run's own steps


@dataclass(frozen=True)
class RemainingTime:
    """Seconds until a run's last step: in 9 of 10 runs from `low` to `high`."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, with saves, and of an evaluation.

    An evaluation is made every `every` steps, and at the end; both are None where there is none, or none is known.
    """

    step_s: float
    deviation_s: float  # of steps
    seen: int  # steps
    correlation: float  # of a step's seconds with those of the step before
    evaluation_s: float | None = None
    every: int | None = None

    def remaining(self, step: int, steps: int) -> RemainingTime:
        """The time from a step to the last one."""
        left = steps - step
        likely = left * self.step_s
        likely += self._evaluations(step, steps)
        if left <= 0:
            return RemainingTime(likely, likely, likely)
        deviation_s, freedom = self._deviation_of_mean(left)
        error = t_quantile(freedom) * deviation_s * left
        error = max(error, LEAST_ERROR * likely)
        low = max(0.0, likely - error)
        return RemainingTime(low, likely, likely + error)

    def _deviation_of_mean(self, left: int) -> tuple[float, int]:
        """The standard deviation of the mean of the steps that are left, in seconds, and its degrees of freedom."""
        correlation = self.correlation
        independent = (1 - correlation) / (1 + correlation)  # of each step
        seen = self.seen * independent
        to_come = left * independent
        variance = 1 / seen + 1 / to_come  # in units of a step's
        freedom = max(1, round(seen) - 1)
        return self.deviation_s * sqrt(variance), freedom

    def _evaluations(self, step: int, steps: int) -> float:
        """The seconds of the evaluations that are left."""
        if self.evaluation_s is None:
            return 0.0
        count = 1  # at the end
        if self.every:
            last_before_end = steps - 1
            count += last_before_end // self.every - step // self.every
        return count * self.evaluation_s


def pace_of(rows: Sequence[Record], evaluations: Sequence[float], every: int | None) -> Pace | None:
    """The pace of an attempt with these rows, whose evaluations took so many seconds; None while it has few steps."""
    seconds = _seconds_of_steps(rows)[FIRST_STEPS:]
    seconds = seconds[-RECENT:]
    count = len(seconds)
    if count < FEWEST_ROWS - FIRST_STEPS - 1:
        return None
    of_evaluation = fmean(evaluations) if evaluations else None
    return Pace(fmean(seconds), stdev(seconds), count, _correlation(seconds), of_evaluation, every)


def read_pace(attempt: Attempt, rows: Sequence[Record]) -> Pace | None:
    """The pace of an attempt with these rows; it reads its events."""
    evaluations = []
    every = None
    for event in read_lines(attempt, "events.jsonl"):
        if event["event"] == "evaluated":
            evaluations.append(float(event["seconds"]))
        elif event["event"] == "plan":
            every = event.get("evaluate_every")
    return pace_of(rows, evaluations, every)


def _correlation(seconds: Sequence[float]) -> float:
    """The correlation of neighbours, with what a short series hides of it (Kendall 1954); at least 0."""
    mean = fmean(seconds)
    squares = products = 0.0
    for before, after in pairwise(seconds):
        products += (before - mean) * (after - mean)
    for value in seconds:
        squares += (value - mean) ** 2
    if squares == 0:
        return 0.0
    found = products / squares
    count = len(seconds)
    found += (1 + 3 * found) / count
    found += CAUTION * sqrt(max(0.0, 1 - found**2) / count)
    return min(MOST_CORRELATION, max(0.0, found))


def _seconds_of_steps(rows: Sequence[Record]) -> list[float]:
    """The seconds between steps that follow each other, without those of an evaluation between them."""
    seconds = []
    for before, row in pairwise(rows):
        if "loss" in row:
            seconds.append(row["time"] - before["time"])
    return seconds
