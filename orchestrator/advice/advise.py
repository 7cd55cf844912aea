"""Advice for a job: the rules and candidates, a race of these, and the job that came out of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.advice.candidates import CandidateProgress, MethodCandidate, candidates, situation_of
from orchestrator.advice.evidence import Recommendation, rules_for
from orchestrator.advice.race import Race, budget_in_steps, race_file_of, race_of
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.conclusion import recommended
from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.plan import planner_of
from orchestrator.planning.spec import load_yaml
from orchestrator.planning.survey import SourceProgress
from orchestrator.sweeps.driver import FoundTrials, SweepDriver
from orchestrator.sweeps.trials import Trial, with_settings
from runfolder.job import Job
from trainer.dry_run.process import DryRunProcess


@dataclass(frozen=True)
class Advice:
    """What evidence says of a job, and which methods could be raced for it."""

    job: Job
    rules: list[Recommendation]
    candidates: list[MethodCandidate]

    @property
    def racing(self) -> list[MethodCandidate]:
        """The candidates that are not left out."""
        racing = []
        for candidate in self.candidates:
            if candidate.reason is None:
                racing.append(candidate)
        return racing

    @property
    def has_no_gpu(self) -> bool:
        """Whether nothing is foretold of memory, as workers have no GPU."""
        for candidate in self.candidates:
            if candidate.plan is not None:
                return not candidate.plan.has_gpus
        return False

    @property
    def has_rough_figures(self) -> bool:
        """Whether memory is foretold by a fitted line for some."""
        rough = [candidate for candidate in self.candidates if candidate.is_rough]
        return bool(rough)

    def to_json(self) -> dict[str, Any]:
        """The advice as plain data, for JSON."""
        rules = [rule.to_json() for rule in self.rules]
        methods = []
        for candidate in self.candidates:
            methods.append(candidate.to_json())
        return {"rules": rules, "candidates": methods}


def advise(
    path: Path,
    overrides: Iterable[str] = (),
    progress: SourceProgress = lambda _source, _rows: None,
    cluster: str | None = None,
    gpu: str | None = None,
    begun: CandidateProgress = lambda _kind, _number, _of: None,
) -> Advice:
    """Plan every method for the job in a file, and say what evidence supports; raises InputError.

    `progress` is called with a data source and the number of its rows that are looked at, `begun` with each method.
    """
    job, _ = read_job(path, overrides)
    with DryRunProcess() as process:
        planner = planner_of(job, process, progress, cluster, gpu)
        roughly = planner._replace(roughly=True)
        found = candidates(roughly, job, begun)
    situation = situation_of(roughly, job, found)
    rules = rules_for(situation)
    return Advice(job, rules, found)


def write_race(advice: Advice, job_file: Path, budget: str) -> Race | None:
    """Write the race that a budget allows as a sweep.yaml; None where there is one, which is gone on with.

    Raises InputError.
    """
    path = race_file_of(job_file)
    if path.exists():
        return None
    steps = budget_in_steps(budget, advice.job, advice.racing)
    race = race_of(advice.job, advice.racing, steps, job_file)
    text = yaml.safe_dump(race.sweep, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return race


def write_advised_job(driver: SweepDriver, found: FoundTrials, comparison: Comparison, job_file: Path) -> Path:
    """Write the job that a race recommends beside the one that was raced, and give its path."""
    trial = _recommended_trial(driver, found, comparison)
    settings = trial.configuration.settings
    plain = with_settings(load_yaml(job_file), settings)
    path = job_file.with_name(f"{job_file.stem}-advised.yaml")
    text = yaml.safe_dump(plain, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def _recommended_trial(driver: SweepDriver, found: FoundTrials, comparison: Comparison) -> Trial:
    """A trial of the configuration that the largest ranking recommends; raises InputError where there is none."""
    if not comparison.rankings:
        raise InputError("no trial was run in full: the budget is too small, or all have failed")
    ranked = recommended(comparison.rankings[0])
    label = ranked.contender.label
    row = next(row for row in comparison.rows if row.label == label)
    first = row.runs[0]
    by_run_id = {}
    for trial in found:
        run_id = driver.run_id(trial)
        by_run_id[run_id] = trial
    return by_run_id[first.run_id]
