"""What came of a sweep: the comparison of the trials that were run in full, and its parent run in MLflow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from orchestrator.comparison.compare import Comparison, arrange
from orchestrator.comparison.measure import OF_TEST_ROWS
from orchestrator.comparison.places import RankingWish
from orchestrator.comparison.run import TrackedRun, load_runs
from orchestrator.errors import InputError
from orchestrator.sweeps.driver import FoundTrials, SweepDriver
from orchestrator.sweeps.spec import BETTER_HIGH
from orchestrator.sweeps.tracked import gather
from orchestrator.sweeps.trials import Variant
from orchestrator.tracking.collect import CollectProgress, deliver_all, with_reasons
from orchestrator.tracking.store import client, resolve
from runfolder.job import Job
from runfolder.variables import without_password

_HOUR = 3600


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep: the comparison of its trials, and what all of them took.

    `steps` has those of cool-downs, too; `device_hours` has not.
    """

    comparison: Comparison
    steps: int
    device_hours: float


def conclude(driver: SweepDriver, found: FoundTrials, progress: CollectProgress) -> SweepResult:
    """Compare what the trials that succeeded came to; raises InputError where MLflow has none of them."""
    undelivered = deliver_all(driver.cluster, progress)
    tracking = driver.submitted["tracking"]
    uri = resolve(tracking["uri"])
    shown_uri = without_password(uri, uri)
    mlflow = client(uri)
    run_ids = set(map(driver.run_id, found))
    runs = []
    for run in load_runs(mlflow, tracking["experiment"], shown_uri):
        if run.run_id in run_ids:
            runs.append(run)
    judged = driver.judged(found)
    finished = [run for run in runs if run.run_id in judged]
    if not finished:
        raise InputError(with_reasons("no trial has succeeded", undelivered))
    reference = _reference(driver, found, finished)
    measure: str = driver.sweep.measure
    of_test_rows = OF_TEST_ROWS + measure.removeprefix("eval_")
    if all(of_test_rows in run.metrics for run in finished):
        measure = of_test_rows
    wish = RankingWish(reference, measure=measure)
    comparison = arrange(finished, f"sweep {driver.sweep.name}", shown_uri, wish)
    gather(mlflow, driver.sweep, driver.digest, runs, comparison.verdict)
    comparison = replace(comparison, undelivered=undelivered)
    steps = 0
    for trial, reached in found.items():
        steps += driver.plan.spent(trial, reached.step)
    return SweepResult(comparison, steps, _device_hours(driver, runs))


def _device_hours(driver: SweepDriver, runs: Iterable[TrackedRun]) -> float:
    """The hours of devices that runs have trained for: steps at the median time of each run."""
    job = Job.model_validate(driver.submitted)
    seconds = 0.0
    for run in runs:
        of_run = run.metrics.get("train_s", 0.0)
        seconds += of_run
    workers = job.resources.world_size
    of_devices = seconds * workers
    return of_devices / _HOUR


def _reference(driver: SweepDriver, found: FoundTrials, finished: Iterable[TrackedRun]) -> str | None:
    """A run of the reference method, in the configuration that did best on the rows that choose; None without one.

    Were it chosen by the rows that judge, it would look better there than it is.
    """
    by_run_id = {run.run_id: run for run in finished}
    by_configuration: dict[Variant, list[TrackedRun]] = {}
    for trial in found:
        run = by_run_id.get(driver.run_id(trial))
        if run is not None and trial.configuration.method == driver.sweep.reference:
            by_configuration.setdefault(trial.configuration, []).append(run)
    if not by_configuration:
        return None
    badness = partial(_badness, driver.sweep.measure)
    best = min(by_configuration.values(), key=badness)
    return best[0].run_id


def _badness(measure: str, runs: Iterable[TrackedRun]) -> float:
    """How bad a configuration is by a measure, on average over its runs; infinite where one of them has none."""
    values = []
    for run in runs:
        value = run.metrics.get(measure, math.nan)
        values.append(value)
    mean = fmean(values)
    if not math.isfinite(mean):
        return math.inf
    return -mean if measure == BETTER_HIGH else mean
