"""What the trials of a sweep have come to, and what is done about it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.sweeps.trials import Trial

TrialState = Literal["going", "paused", "succeeded", "failed"]
ScoresByStep = Mapping[int, float]  # what was measured, by the step


@dataclass(frozen=True)
class Reached:
    """What a trial has come to: its state, its last step, and its evaluations."""

    state: TrialState
    step: int = 0
    scores: ScoresByStep = field(default_factory=dict)


ProgressByTrial = Mapping[Trial, Reached]  # of those that were begun


@dataclass(frozen=True)
class Move:
    """A trial that is to begin or to go on, up to a step; None: to its end."""

    trial: Trial
    until: int | None


@dataclass(frozen=True)
class Decision:
    """What to do now, and whether all is done once nothing is going; `why`, where the sweep ends early."""

    moves: list[Move]
    done: bool
    why: str | None = None


@dataclass
class StepBudget:
    """The steps that are left of a budget, how many trials may begin, and how many are going."""

    left: int
    free: int
    going: int = 0


def last_step(progress: ProgressByTrial, trial: Trial) -> int:
    """The last step of a trial; 0 where it has not begun."""
    if trial not in progress:
        return 0
    return progress[trial].step


def those_that_may_go(progress: ProgressByTrial, trials: Iterable[Trial], until: float = math.inf) -> list[Trial]:
    """Those of some trials that have not begun, or wait before a step."""
    free = []
    for trial in trials:
        if trial not in progress:
            free.append(trial)
            continue
        reached = progress[trial]
        if reached.state == "paused" and reached.step < until:
            free.append(trial)
    return free
