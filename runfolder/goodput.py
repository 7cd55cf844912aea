"""Where the time of a run went, from the timestamps in its folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from runfolder.files import Record

# Verdicts of attempts that did as they were asked, up to their end.
_IN_ORDER = ("success", "paused", "cancelled", "preemption", "walltime")


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what it did; between its end and a reopen it does nothing.

    `queued`: without an attempt, and without nodes where a scheduler grants them. `starting`: from there to the end
    of the attempt's first step. `training`: in steps, evaluations, saves and the export. `repeated`: in steps that
    an earlier attempt had done. `stalled`: after the last row of an attempt that broke, until that was known,
    and while one that goes on has been silent for long.
    """

    queued: float = 0.0
    starting: float = 0.0
    training: float = 0.0
    repeated: float = 0.0
    stalled: float = 0.0

    @property
    def total(self) -> float:
        """All the seconds together."""
        in_steps = self.training + self.repeated
        outside_steps = self.queued + self.starting + self.stalled
        return in_steps + outside_steps


class StepTime(NamedTuple):
    """A step that was reported, and when (seconds since 1970)."""

    step: int
    time: float


@dataclass(frozen=True)
class SlotTimes:
    """When a slot was taken, and what an attempt did then; times are in seconds since 1970.

    `last_row` is the time of its last row, of a step or an evaluation; `verdict` is None where nobody wrote one.
    `granted` is when a scheduler gave it the nodes that its predecessor had not. `left`: whether the last one is over
    without a verdict; `silent_since`: from when on it has written nothing, where that is long.
    """

    kind: str
    taken: float
    steps: Sequence[StepTime] = ()
    last_row: float | None = None
    verdict: Record | None = None
    granted: float | None = None
    left: bool = False
    silent_since: float | None = None

    @property
    def begun(self) -> float:
        """When its start began."""
        if self.granted is None:
            return self.taken
        return self.granted

    @property
    def furthest(self) -> int:
        """The last step that was reported; 0 before the first."""
        if not self.steps:
            return 0
        return self.steps[-1].step

    def ended(self, next_begun: float) -> float:
        """When an attempt had ended, at the latest as the start of the next slot began."""
        if self.verdict is None:
            return next_begun
        told: float = self.verdict.get("time", next_begun)
        return told

    def broke(self, is_last: bool) -> bool:
        """Whether an attempt ended otherwise than in order; the last one without a verdict may go on."""
        if self.verdict is None:
            return self.left or not is_last
        return self.verdict["kind"] not in _IN_ORDER

    def quiet_from(self, ended: float, is_last: bool) -> float | None:
        """When the work ended of an attempt that ended then, or has not yet; None where it reported nothing."""
        if self.broke(is_last):
            return self.last_row
        if self.silent_since is not None:
            return self.silent_since
        return ended


class Interval(NamedTuple):
    """A part of a run's time, and the field of Goodput that it counts in."""

    phase: str
    begin: float
    end: float


def goodput(submitted: float, slots: Sequence[SlotTimes], now: float) -> Goodput:
    """Where the time of a run went from its submission to now, or to its end."""
    seconds: dict[str, float] = {}
    for phase, begin, end in _intervals(submitted, slots, now):
        length = max(0.0, end - begin)  # the clocks of several hosts differ a little
        before = seconds.get(phase, 0.0)
        seconds[phase] = before + length
    return Goodput(**seconds)


def _intervals(submitted: float, slots: Sequence[SlotTimes], now: float) -> Iterator[Interval]:
    """The time of a run in order, in parts that each count in one field."""
    waiting_since: float | None = submitted
    done = 0  # steps, by all attempts so far
    later = [slot.begun for slot in slots[1:]]
    for slot, next_begun in zip(slots, [*later, now], strict=False):
        if waiting_since is not None:
            yield Interval("queued", waiting_since, slot.begun)
        waiting_since = slot.begun
        if slot.kind == "close":
            waiting_since = None
        elif slot.kind == "attempt":
            ended = slot.ended(next_begun)
            is_last = slot is slots[-1]
            quiet_from = slot.quiet_from(ended, is_last)
            yield from _intervals_of_attempt(slot, ended, quiet_from, done)
            done = max(done, slot.furthest)
            waiting_since = ended
    if waiting_since is not None:
        yield Interval("queued", waiting_since, now)


def _intervals_of_attempt(
    attempt: SlotTimes, ended: float, quiet_from: float | None, done: int
) -> Iterator[Interval]:
    """The time of an attempt that nothing came from any more since `quiet_from`; others had done so many steps."""
    if not attempt.steps or quiet_from is None:
        yield Interval("starting", attempt.begun, ended)
        return
    first = attempt.steps[0]
    last = attempt.steps[-1]
    yield Interval("starting", attempt.begun, first.time)
    for before, after in pairwise(attempt.steps):
        phase = "training"
        if after.step <= done:
            phase = "repeated"
        yield Interval(phase, before.time, after.time)
    yield Interval("training", last.time, quiet_from)
    yield Interval("stalled", quiet_from, ended)
