"""Where the trials of a sweep pause to be judged, and what it costs to come there."""

from dataclasses import dataclass

from orchestrator.sweeps.spec import Sweep
from orchestrator.sweeps.trials import Trial
from runfolder.cooling import cool_down_steps


@dataclass(frozen=True)
class Rungs:
    """The rungs of a sweep whose full run has so many steps."""

    sweep: Sweep
    steps: int

    @property
    def rungs(self) -> list[int]:
        """The steps at which trials pause; none where all are run in full."""
        if self.sweep.rule in ("grid", "random"):
            return []
        rungs = []
        for share in self.sweep.rungs:
            step = share * self.steps
            evaluations = round(step / self.every)
            multiple = max(1, evaluations) * self.every
            if multiple < self.steps and multiple not in rungs:
                rungs.append(multiple)
        return rungs

    @property
    def every(self) -> int:
        """The steps between two evaluations: every rung is a multiple of it."""
        first = self.sweep.rungs[0]
        step = round(first * self.steps)
        return max(1, step)

    def target(self, step: int) -> int:
        """Where a trial that has done so many steps pauses or ends."""
        for rung in self.rungs:
            if rung > step:
                return rung
        return self.steps

    def cost(self, step: int, rung: int) -> int:
        """The steps that it takes to go from one step up to a rung, and to be judged there."""
        steps = rung - step
        to_judge = cool_down_steps(self.sweep.cool_down, rung, self.steps)
        return steps + to_judge

    def spent(self, trial: Trial, step: int) -> int:
        """The steps that a trial has taken up to one, with those of the rungs where it has paused."""
        if self.sweep.rule == "race" and trial.seed != self.sweep.seeds[0]:
            return step  # it was run for the finals alone, without a pause
        total = 0
        before = 0
        for rung in self.rungs:
            if rung <= step:
                total += self.cost(before, rung)
                before = rung
        return total + step - before
