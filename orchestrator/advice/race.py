"""A race of candidates within a budget, written as a sweep.yaml: sweeps plan it, drive it and judge it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from orchestrator.advice.candidates import REFERENCE, MethodCandidate
from orchestrator.errors import InputError
from orchestrator.planning.spec import PlainJob
from orchestrator.sweeps.rules import CANDIDATES, FIRST_SEEDS, SweepPlan
from orchestrator.sweeps.spec import six_digits, sweep_of
from orchestrator.sweeps.widening import MOST_ADDED
from runfolder.job import Job

_BUDGET_TEXT = re.compile(r"(\d+(?:\.\d+)?)(gpuh|steps)")
_AROUND_DEFAULT = (0.3, 1.0, 3.0)  # times the default rate of a method
_SEEDS = (5, 3)
_FINALISTS = (3, 2, 1)
_FEWEST_METHODS = 2
_NAME_LENGTH = 25  # characters of the job's name in the race's


@dataclass(frozen=True)
class Race:
    """A race as it is written down, its methods, and the most steps that it takes."""

    sweep: PlainJob
    methods: tuple[str, ...]
    most_steps: int


def race_file_of(job_file: Path) -> Path:
    """Where the race of a job is written down: beside the job.yaml."""
    return job_file.with_name(f"{job_file.stem}-race.yaml")


def budget_in_steps(text: str, job: Job, racing: Sequence[MethodCandidate]) -> int:
    """A budget like 6gpuh or 20000steps, in steps of the slowest of the candidates; raises InputError."""
    found = _BUDGET_TEXT.fullmatch(text)
    if not found:
        allowed = "hours of GPUs like 6gpuh, or steps of training like 20000steps"
        raise InputError(f"--budget: found {text!r}; allowed: {allowed}")
    amount = float(found[1])
    if found[2] == "steps":
        return int(amount)
    slowest = 0.0
    for candidate in racing:
        of_step = gpu_hours_of_step(candidate, job)
        if of_step is None:
            raise InputError(
                f"--budget: found {text!r}, and nobody knows how long {candidate.kind} takes here; "
                "allowed: steps of training like 20000steps"
            )
        slowest = max(slowest, of_step)
    return int(amount / slowest)


def gpu_hours_of_step(candidate: MethodCandidate, job: Job) -> float | None:
    """The hours of GPUs that a step takes with a candidate; None where that is not known."""
    plan = candidate.plan
    if plan is None or plan.hours is None or not plan.steps:
        return None
    return plan.hours.likely * job.resources.world_size / plan.steps


def race_of(job: Job, racing: Sequence[MethodCandidate], budget: int, job_file: Path) -> Race:
    """The race of as many of the candidates, which come best first, as a budget allows; raises InputError."""
    least = 0
    for race in _races(job, racing, budget, job_file):
        least = race.most_steps
        if least <= budget:
            return race
    allowed = f"{least:,} or more, which a race of {_ordered(racing)[0].kind} and one other method takes"
    raise InputError(f"--budget: found {budget:,} steps; allowed: {allowed}")


def budget_range(job: Job, racing: Sequence[MethodCandidate], job_file: Path) -> tuple[int, int]:
    """The steps of the smallest race of the candidates and of the largest; raises InputError where there is none."""
    races = _races(job, racing, 1, job_file)
    steps = [race.most_steps for race in races]
    least = min(steps)
    most = max(steps)
    return least, most


def _races(job: Job, racing: Sequence[MethodCandidate], budget: int, job_file: Path) -> Iterator[Race]:
    """The races of the candidates, the largest first; raises InputError where the job allows none."""
    race_file = race_file_of(job_file)
    steps = job.train.steps
    if steps is None:
        raise InputError("train.steps: found nothing; a race compares runs of equally many steps")
    if not job.data.eval:
        raise InputError("data.eval: found nothing; allowed: rows by which a race is judged")
    ordered = _ordered(racing)
    if len(ordered) < _FEWEST_METHODS:
        raise InputError("fewer than two methods can be raced: see the reasons why others are left out")
    for seeds, finalists in product(_SEEDS, _FINALISTS):
        for count in range(len(ordered), _FEWEST_METHODS - 1, -1):
            raced = ordered[:count]
            plain = _plain_sweep(job, raced, seeds, finalists, budget, job_file.name)
            sweep = sweep_of(plain, race_file)
            kinds = tuple(candidate.kind for candidate in raced)
            yield Race(plain, kinds, most_steps(SweepPlan(sweep, steps), count))


def _ordered(racing: Sequence[MethodCandidate]) -> list[MethodCandidate]:
    """The candidates with the reference first."""
    reference = []
    others = []
    for candidate in racing:
        if candidate.kind == REFERENCE:
            reference.append(candidate)
        else:
            others.append(candidate)
    return reference + others


def most_steps(plan: SweepPlan, methods: int) -> int:
    """The most steps that a race of so many methods can take, where each range is widened by as much as may be."""
    first, *later = plan.rungs or [plan.steps]
    rates = len(_AROUND_DEFAULT) + MOST_ADDED
    total = methods * rates * plan.cost(0, first)
    before = first
    for rung in later:
        total += methods * CANDIDATES * plan.cost(before, rung)
        before = rung
    seeds = len(plan.sweep.seeds)
    tried = min(seeds, FIRST_SEEDS)
    of_candidates = CANDIDATES * (tried - 1)
    whole_runs = of_candidates + seeds - tried
    rest_of_first = CANDIDATES * (plan.steps - before)
    of_finalist = rest_of_first + whole_runs * plan.steps
    finalists = min(methods, plan.sweep.finalists + 1)
    return total + finalists * of_finalist


def _plain_sweep(
    job: Job, racing: Sequence[MethodCandidate], seeds: int, finalists: int, budget: int, job_file: str
) -> PlainJob:
    """A sweep.yaml as plain data."""
    methods = []
    for candidate in racing:
        assert candidate.plan is not None
        rates = []
        for factor in _AROUND_DEFAULT:
            rate = factor * candidate.plan.lr
            rates.append(six_digits(rate))
        axes = {"train.lr": rates}
        methods.append({**candidate.options, "axes": axes})
    begin = job.name[:_NAME_LENGTH].rstrip("-")
    plain: dict[str, Any] = {
        "name": f"{begin}-advice",
        "job": job_file,
        "methods": methods,
        "seeds": list(range(seeds)),
        "rule": "race",
        "budget": budget,
        "finalists": finalists,
        "reference": racing[0].kind,  # LoRA, or the first of the others where that cannot run
    }
    return plain
