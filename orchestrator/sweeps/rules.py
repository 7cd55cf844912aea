"""What a sweep does next: a pure function of what its trials have come to. Nothing else is remembered.

A trial goes to a rung, which is a step, pauses there, and goes on from its checkpoint where the rule says so.
- grid, random: every trial in full.
- asha (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"): whoever is among the best of a rung,
  as far as that is known, goes on; else a new trial begins.
- race: all trials of a rung are waited for; the best of each method go on, as rates and families separate early. The
  best configurations of the best methods, and of the reference, are then run in full, the best one with all seeds.

A rung judges a branch that was cooled down (trainer/cool_down.py), whose steps are paid for too. A trial that begins
is paid for up to the step where it pauses, so the budget is never exceeded.
"""

import math
from collections.abc import Collection, Sequence

from orchestrator.sweeps.progress import (
    Decision,
    Move,
    ProgressByTrial,
    StepBudget,
    last_step,
    those_that_may_go,
)
from orchestrator.sweeps.rungs import Rungs
from orchestrator.sweeps.spec import BETTER_HIGH
from orchestrator.sweeps.trials import Trial, Variant, variants_of, with_seeds
from orchestrator.sweeps.widening import best_of_methods, widened

CANDIDATES = 2  # configurations of a finalist that are run in full
FIRST_SEEDS = 3  # with which the better one of them is chosen


class SweepPlan(Rungs):
    """A sweep whose full run has so many steps."""

    def trials(self, progress: ProgressByTrial) -> list[Trial]:
        """All trials that there may be, as far as is known now which ranges are widened."""
        chosen = self._configurations(progress, self._first_judged)
        return with_seeds(chosen, self.sweep.seeds)

    @property
    def _first_judged(self) -> int:
        """The first step at which trials are judged."""
        rungs = self.rungs
        if rungs:
            return rungs[0]
        return self.steps

    def decide(self, progress: ProgressByTrial) -> Decision:
        """What to do next."""
        finals = self._finals(progress)
        account = self._account(progress, finals)
        moves: list[Move] = []
        is_short = False
        for trial in self._wanted(progress, finals):
            if account.free <= 0:
                break
            step = last_step(progress, trial)
            until = self._until(trial, step, finals)
            cost = self.spent(trial, until) - self.spent(trial, step)
            if cost > account.left:
                is_short = True
                continue
            account.left -= cost
            account.free -= 1
            move = Move(trial, self._pause(until))
            moves.append(move)
        done = not moves and not account.going
        why = None
        if done:
            why = self._why_early(progress, is_short)
        return Decision(moves, done, why)

    def _account(self, progress: ProgressByTrial, finals: Collection[Trial]) -> StepBudget:
        """What is left of the budget, and how many trials may be begun now."""
        account = StepBudget(self.sweep.budget, self.sweep.parallel)
        for trial, reached in progress.items():
            steps = reached.step
            if reached.state == "going":
                account.free -= 1
                account.going += 1
                steps = self._until(trial, steps, finals)
            account.left -= self.spent(trial, steps)
        return account

    def _why_early(self, progress: ProgressByTrial, is_short: bool) -> str | None:
        """Why a sweep ends before all was run; None where it does not."""
        if is_short:
            return f"the budget of {self.sweep.budget} steps is spent"
        failed = 0
        for reached in progress.values():
            if reached.state == "failed":
                failed += 1
        if failed:
            return f"{failed} trials have failed"
        return None

    def pause_of(self, trial: Trial, progress: ProgressByTrial) -> int | None:
        """Where a trial that is on its way pauses; None at its end."""
        finals = self._finals(progress)
        step = last_step(progress, trial)
        until = self._until(trial, step, finals)
        return self._pause(until)

    def _pause(self, until: int) -> int | None:
        """The pause of a trial that goes up to a step; None at its end."""
        if until < self.steps:
            return until
        return None

    def _until(self, trial: Trial, step: int, finals: Collection[Trial]) -> int:
        """The step up to which a trial goes now: of a final without a pause."""
        if trial in finals:
            return self.steps
        return self.target(step)

    def _wanted(self, progress: ProgressByTrial, finals: Sequence[Trial]) -> list[Trial]:
        """The trials that may begin or go on, the most wanted first."""
        rule = self.sweep.rule
        if rule == "race":
            return self._race(progress, finals)
        if rule == "asha":
            return self._asha(progress)
        chosen = self._configurations(progress, self.steps)
        trials = with_seeds(chosen, self.sweep.seeds)
        return those_that_may_go(progress, trials)

    def _configurations(self, progress: ProgressByTrial, step: int) -> list[Variant]:
        """Those that the sweep began with, and those beyond the ends of ranges, by what is known at a step."""
        begun_with = variants_of(self.sweep)
        if not self.sweep.widen or self.sweep.rule in ("random", "asha"):
            return begun_with
        chosen = begun_with
        while True:
            scores = self._scores(progress, chosen, step)
            extended = widened(chosen, scores, begun_with)
            if len(extended) == len(chosen):
                return chosen
            chosen = extended

    def _score_of(self, progress: ProgressByTrial, trial: Trial, step: int) -> dict[Variant, float]:
        """How bad a trial is at a step, where that is known: a failed one is the worst."""
        reached = progress.get(trial)
        if reached is None:
            return {}
        score = reached.scores.get(step)
        if score is None and reached.state != "failed":
            return {}
        if score is None or not math.isfinite(score):
            score = math.inf
        elif self.sweep.measure == BETTER_HIGH:
            score = -score
        return {trial.configuration: score}

    def _asha(self, progress: ProgressByTrial) -> list[Trial]:
        """Those that a rung promotes, from the highest rung down; then those that have not begun."""
        trials = with_seeds(variants_of(self.sweep), self.sweep.seeds)
        wanted = []
        for rung in reversed(self.rungs):
            scores: dict[Trial, float] = {}
            for trial in trials:
                found = self._score_of(progress, trial, rung)
                for score in found.values():
                    scores[trial] = score
            best_first = sorted(scores, key=scores.__getitem__)
            share = len(best_first) * self.sweep.keep
            promoted = best_first[: int(share)]
            for trial in promoted:
                if self._is_waiting(progress, trial, rung):
                    wanted.append(trial)
        for trial in trials:
            if trial not in progress:
                wanted.append(trial)
        return wanted

    def _is_waiting(self, progress: ProgressByTrial, trial: Trial, rung: int) -> bool:
        """Whether a trial waits at a rung, or soon behind it."""
        reached = progress[trial]
        if reached.state != "paused":
            return False
        return rung <= reached.step < self.target(rung)

    def _race(self, progress: ProgressByTrial, finals: Sequence[Trial]) -> list[Trial]:
        """The trials of the lowest rung that is not judged yet; after the last one, the finals."""
        first_seed = self.sweep.seeds[:1]
        first = self._first_judged
        chosen = self._configurations(progress, first)
        for rung in self.rungs:
            scores = self._scores(progress, chosen, rung)
            if len(scores) < len(chosen):
                trials = with_seeds(chosen, first_seed)
                return those_that_may_go(progress, trials, rung)
            chosen = best_of_methods(scores, self.sweep.keep, CANDIDATES)
        return those_that_may_go(progress, finals)

    def _finals(self, progress: ProgressByTrial) -> list[Trial]:
        """The trials that are run in full; none before the last rung is judged.

        A rate that a rung has chosen by noise would make its method look worse than it is. So two configurations of
        each finalist are run in full with the first seeds, and the better one of both with all seeds.
        """
        if self.sweep.rule != "race":
            return []
        finals: list[Trial] = []
        for candidates in self._candidates(progress):
            first_seeds = self.sweep.seeds[:FIRST_SEEDS]
            tried = with_seeds(candidates, first_seeds)
            finals += tried
            means: dict[Variant, float] = {}
            for configuration in candidates:
                mean = self._mean_in_full(progress, configuration, first_seeds)
                if mean is not None:
                    means[configuration] = mean
            if len(means) < len(candidates):
                continue
            best = min(candidates, key=means.__getitem__)
            other_seeds = self.sweep.seeds[FIRST_SEEDS:]
            finals += with_seeds([best], other_seeds)
        return finals

    def _candidates(self, progress: ProgressByTrial) -> list[list[Variant]]:
        """The best configurations, at most two, of each finalist; none before the last rung is judged."""
        chosen = self._configurations(progress, self._first_judged)
        scores: dict[Variant, float] = {}
        for rung in self.rungs:
            scores = self._scores(progress, chosen, rung)
            if len(scores) < len(chosen):
                return []
            chosen = best_of_methods(scores, self.sweep.keep, CANDIDATES)
        by_method: dict[str, list[Variant]] = {}
        for configuration in sorted(chosen, key=lambda each: scores.get(each, 0.0)):
            of_method = by_method.setdefault(configuration.method, [])
            of_method.append(configuration)
        methods = list(by_method)
        finalists = methods[: self.sweep.finalists]
        reference = self.sweep.reference
        if reference in by_method and reference not in finalists:
            finalists.append(reference)
        candidates = []
        for method in finalists:
            best = by_method[method]
            candidates.append(best[:CANDIDATES])
        return candidates

    def _mean_in_full(self, progress: ProgressByTrial, configuration: Variant, seeds: Sequence[int]) -> float | None:
        """How bad a configuration is at the end of a full run, over some seeds; None before that is known."""
        total = 0.0
        for trial in with_seeds([configuration], seeds):
            scores = self._score_of(progress, trial, self.steps)
            if not scores:
                return None
            total += scores[configuration]
        return total / len(seeds)

    def _scores(self, progress: ProgressByTrial, chosen: Sequence[Variant], rung: int) -> dict[Variant, float]:
        """How bad configurations are at a rung, with the first seed, as far as that is known."""
        scores = {}
        first_seed = self.sweep.seeds[:1]
        for trial in with_seeds(chosen, first_seed):
            found = self._score_of(progress, trial, rung)
            scores.update(found)
        return scores
