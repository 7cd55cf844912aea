"""The rules of sweeps on synthetic curves: who goes on, what it costs, and what a race finds."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.advice.race import most_steps
from orchestrator.comparison.measure import MEASURES
from orchestrator.comparison.outcomes import QualityByRow
from orchestrator.comparison.ranking import Contender, rank
from orchestrator.sweeps.progress import Reached
from orchestrator.sweeps.rules import SweepPlan
from orchestrator.sweeps.spec import Sweep
from orchestrator.sweeps.trials import Trial, Variant, variants_of, with_seeds
from runfolder.cooling import cool_down_steps

STEPS = 90
Curve = Callable[[Trial, int], float]  # how bad a trial is at a step


def sweep(**changes: Any) -> Sweep:
    settings = {
        "name": "sweep",
        "job": "job.yaml",
        "axes": {"train.lr": {"log": [1e-4, 1e-2], "count": 5}},
        "seeds": [0, 1, 2],
        "budget": 10**6,
        **changes,
    }
    return Sweep.model_validate(settings)


def methods(*kinds: str) -> list[dict[str, Any]]:
    return [{"options": {"kind": kind}} for kind in kinds]


def test_a_final_is_not_paused_and_others_are() -> None:
    plan = SweepPlan(sweep(rule="race", widen=False, axes={"train.lr": [1e-3, 1e-2]}, seeds=[0, 1]), STEPS)
    first, second = with_seeds(variants_of(plan.sweep), [0])
    assert plan.pause_of(first, {}) == 10
    progress = {
        first: Reached("paused", 30, {10: 1.0, 30: 1.0}),
        second: Reached("paused", 30, {10: 2.0, 30: 2.0}),
    }
    final = replace(first, seed=1)
    assert plan.pause_of(final, progress) is None and plan.pause_of(first, progress) is None
    assert {(move.trial.seed, move.until) for move in plan.decide(progress).moves} == {(0, None), (1, None)}


def steps_taken(simulation: "Simulation") -> int:
    return sum(reached.step for reached in simulation.progress.values())


class Simulation:
    """Trials that go where a plan sends them, each tick some of them, and are measured by a curve."""

    def __init__(self, plan: SweepPlan, curve: Curve, seed: int = 0) -> None:
        self.plan = plan
        self.curve = curve
        self.rng = np.random.default_rng(seed)
        self.progress: dict[Trial, Reached] = {}
        self.until: dict[Trial, int] = {}
        self.most_going = 0
        self.cooled = 0  # steps of cool-downs

    def run(self) -> str | None:
        for _ in range(10_000):
            decision = self.plan.decide(self.progress)
            again = self.plan.decide(dict(self.progress))
            assert decision == again
            if decision.done:
                return decision.why
            for move in decision.moves:
                before = self.progress.get(move.trial, Reached("going"))
                assert before.step < (move.until or STEPS), "computed twice"
                self.progress[move.trial] = replace(before, state="going")
                self.until[move.trial] = move.until or STEPS
            going = [trial for trial, reached in self.progress.items() if reached.state == "going"]
            self.most_going = max(self.most_going, len(going))
            assert going, "nothing goes on, and it is not done"
            for trial in going:
                if self.rng.random() < 0.7:
                    self._finish(trial)
        raise AssertionError("it does not end")

    def _finish(self, trial: Trial) -> None:
        step = self.until[trial]
        scores = {**self.progress[trial].scores, step: self.curve(trial, step)}
        state = "succeeded" if step == STEPS else "paused"
        self.cooled += cool_down_steps(self.plan.sweep.cool_down, step, STEPS)
        self.progress[trial] = Reached(state, step, scores)  # type: ignore[arg-type]

    def full(self) -> list[Trial]:
        return [trial for trial, reached in self.progress.items() if reached.state == "succeeded"]


def bowl(best: float) -> Curve:
    """A loss that is lowest at one rate, at any step."""
    return lambda trial, step: abs(math.log10(trial.configuration.settings["train.lr"] / best)) + 1 / step


def rates(simulation: Simulation) -> list[float]:
    return sorted({trial.configuration.settings["train.lr"] for trial in simulation.progress})


def test_a_grid_runs_every_trial_in_full_once() -> None:
    simulation = Simulation(SweepPlan(sweep(parallel=3), STEPS), bowl(1e-3))
    assert simulation.run() is None
    assert len(simulation.full()) == len(simulation.progress) == 5 * 3
    assert simulation.most_going == 3


@pytest.mark.parametrize(("best", "expected"), [(1e-3, 5), (1e-1, 7), (1.2e-2, 6), (1e-9, 7)])
def test_a_range_is_widened_where_the_best_value_is_at_its_end(best: float, expected: int) -> None:
    simulation = Simulation(SweepPlan(sweep(seeds=[0]), STEPS), bowl(best))
    simulation.run()
    assert len(rates(simulation)) == expected
    closed = Simulation(SweepPlan(sweep(seeds=[0], widen=False), STEPS), bowl(best))
    closed.run()
    assert len(rates(closed)) == 5


def test_random_draws_are_always_the_same_and_within_the_range() -> None:
    drawn = sweep(rule="random", trials=12)
    assert variants_of(drawn) == variants_of(drawn)
    simulation = Simulation(SweepPlan(drawn, STEPS), bowl(1e-3))
    simulation.run()
    assert len(rates(simulation)) == 12 and all(1e-4 <= rate <= 1e-2 for rate in rates(simulation))


def test_asha_sends_few_to_the_end_and_the_best_among_them() -> None:
    wide = sweep(rule="asha", axes={"train.lr": {"log": [1e-5, 1e-1], "count": 27}}, seeds=[0])
    plan = SweepPlan(wide, STEPS)
    assert plan.rungs == [10, 30]
    simulation = Simulation(plan, bowl(1e-3))
    assert simulation.run() is None
    assert len(simulation.progress) == 27
    assert 3 <= len(simulation.full()) <= 9
    closest = min(rates(simulation), key=lambda rate: abs(math.log10(rate / 1e-3)))
    assert closest in [trial.configuration.settings["train.lr"] for trial in simulation.full()]
    assert steps_taken(simulation) < 0.45 * 27 * STEPS


@pytest.mark.parametrize("rule", ["grid", "random", "asha", "race"])
@pytest.mark.parametrize("budget", [5, 95, 400, 1234])
def test_the_budget_is_never_exceeded(rule: str, budget: int) -> None:
    limited = sweep(rule=rule, budget=budget, methods=methods("lora", "dora"), parallel=7)
    simulation = Simulation(SweepPlan(limited, STEPS), bowl(1e-3), seed=budget)
    why = simulation.run()
    assert why == f"the budget of {budget} steps is spent" or budget == 1234
    assert steps_taken(simulation) + simulation.cooled <= budget


def test_the_whole_of_a_small_budget_is_used_and_no_cool_down_is_unpaid() -> None:
    """Twelve steps take one trial to the first rung at 10 and cool it down for two; eleven take none there."""
    for budget, begun in ((11, 0), (12, 1), (23, 1), (24, 2)):
        limited = sweep(rule="asha", budget=budget, cool_down=0.2, seeds=[0])
        assert len(SweepPlan(limited, STEPS).decide({}).moves) == begun


def test_a_trial_that_paused_a_step_late_is_promoted_all_the_same() -> None:
    plan = SweepPlan(sweep(rule="asha", axes={"train.lr": [1e-3, 1e-2, 1e-1]}, seeds=[0]), STEPS)
    trials = with_seeds(variants_of(plan.sweep), [0])
    progress = {trial: Reached("paused", 11, {10: place}) for place, trial in enumerate(trials)}
    assert [(move.trial, move.until) for move in plan.decide(progress).moves] == [(trials[0], 30)]


@pytest.mark.parametrize("number", range(12))
def test_a_race_takes_no_more_than_is_said_before(number: int) -> None:
    rng = np.random.default_rng(number)
    count = int(rng.integers(2, 6))
    raced = sweep(
        rule="race",
        methods=methods(*(f"m{place}" for place in range(count))),
        axes={"train.lr": {"log": [1e-4, 1e-2], "count": 3}},
        seeds=list(range(int(rng.integers(1, 7)))),
        finalists=int(rng.integers(1, 4)),
        reference="m0",
        parallel=int(rng.integers(1, 9)),
    )
    plan = SweepPlan(raced, STEPS)
    slope = float(rng.normal())  # a best rate at an end, which is gone beyond
    simulation = Simulation(
        plan,
        lambda trial, _: slope * math.log10(trial.configuration.settings["train.lr"]) + 0.1 * rng.normal(),
        number,
    )
    simulation.run()
    assert steps_taken(simulation) + simulation.cooled <= most_steps(plan, count)


def test_a_failed_trial_is_not_repeated_and_does_not_hold_up_a_race() -> None:
    plan = SweepPlan(sweep(rule="race", methods=methods("lora", "dora")), STEPS)
    simulation = Simulation(plan, bowl(1e-3))
    first = Trial(variants_of(plan.sweep)[0], 0)
    simulation.progress[first] = Reached("failed", 3)
    assert simulation.run() == "1 trials have failed"
    assert simulation.progress[first] == Reached("failed", 3)
    assert {trial.configuration.method for trial in simulation.full()} == {"lora", "dora"}


def chosen_in(simulation: Simulation) -> list[Variant]:
    """The configurations that a race has run in full with all seeds."""
    counts = Counter(trial.configuration for trial in simulation.full())
    return [configuration for configuration, count in counts.items() if count == SEEDS]


ROWS, SEEDS, RATES = 2000, 8, 3


def race(number: int, planted: float) -> str:
    """What a race of four methods finds of the one that is better by so much at its best rate."""
    rng = np.random.default_rng(number)
    skill = {"lora": 0.5, "dora": 0.5, "vera": 0.47, "best": 0.5 + planted}
    at = {method: rng.integers(0, RATES) for method in skill}
    raced = sweep(
        rule="race",
        methods=methods(*skill),
        axes={"train.lr": {"log": [1e-4, 1e-2], "count": RATES}},
        seeds=list(range(SEEDS)),
        measure="eval_exact_match",
        widen=False,
        parallel=9,
    )
    values = raced.axes["train.lr"].values  # type: ignore[union-attr]

    def expected(trial: Trial) -> float:
        away = abs(values.index(trial.configuration.settings["train.lr"]) - at[trial.configuration.method])
        return skill[trial.configuration.method] - 0.04 * away

    def curve(trial: Trial, step: int) -> float:
        learned = 1 - 0.6 * math.exp(-3 * step / STEPS)
        return expected(trial) * learned + 0.012 * rng.normal()

    simulation = Simulation(SweepPlan(raced, STEPS), curve, seed=number)
    simulation.run()
    ease = rng.normal(size=ROWS)
    outcomes: dict[str, QualityByRow] = {}
    for configuration in chosen_in(simulation):
        method = configuration.method
        trials = [trial for trial in simulation.full() if trial.configuration == configuration]
        of_method = 0.3 * rng.normal(size=ROWS)
        rights = []
        for trial in trials:
            shift = float(np.sqrt(1 + 0.3**2 + 0.3**2)) * (expected(trial) - 0.5) * math.sqrt(2 * math.pi)
            chance = 0.3 * rng.normal(size=ROWS)
            rights.append((ease + of_method + shift + 0.022 * rng.normal() + chance > 0).astype(float))
        seeds = tuple(str(trial.seed) for trial in trials)
        outcomes[method] = QualityByRow(seeds, np.array(rights))
    contenders = [Contender(place, method, outcome) for place, (method, outcome) in enumerate(outcomes.items())]
    reference = next(each.number for each in contenders if each.label == "lora")
    ranking = rank(contenders, MEASURES[0], reference)
    return next((each.finding for each in ranking.ranked if each.contender.label == "best"), "left out")


def share_of(found: list[str], *wanted: str) -> float:
    return sum(each in wanted for each in found) / len(found)


def test_races_find_what_is_better_and_nothing_else_in_a_sample() -> None:
    assert share_of([race(number, 0.03) for number in range(6)], "better") >= 0.5
    assert share_of([race(number, 0.0) for number in range(6)], "better", "worse") <= 0.4


@pytest.mark.soak
def test_races_find_what_is_better_and_nothing_else() -> None:
    assert share_of([race(number, 0.03) for number in range(200)], "better") >= 0.8
    assert share_of([race(number, 0.0) for number in range(200)], "cannot tell apart", "as good", "left out") >= 0.92


def test_a_thousand_trials_are_decided_on_soon() -> None:
    large = sweep(
        rule="race",
        methods=methods(*(f"m{number}" for number in range(40))),
        axes={"train.lr": {"log": [1e-5, 1e-1], "count": 25}},
        parallel=64,
    )
    plan = SweepPlan(large, STEPS)
    chosen = variants_of(large)
    assert len(chosen) == 1000
    progress = {Trial(each, 0): Reached("paused", 10, {10: 1.0 / place}) for place, each in enumerate(chosen, 1)}
    began = time.process_time()
    decision = plan.decide(progress)
    assert len(decision.moves) == 40  # beyond an end of each method's range
    assert time.process_time() - began < 30  # of a slow machine; 2 s are aimed at
