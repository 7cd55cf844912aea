"""What came of a sweep: the comparison of the trials that were run in full, and its parent run in MLflow."""

from dataclasses import replace

from orchestrator.comparison.compare import Comparison, arrange
from orchestrator.comparison.places import RankingWish
from orchestrator.comparison.run import load_runs
from orchestrator.errors import InputError
from orchestrator.sweeps.driver import FoundTrials, SweepDriver
from orchestrator.sweeps.tracked import gather
from orchestrator.tracking.collect import CollectProgress, deliver_all, with_reasons
from orchestrator.tracking.store import client, resolve
from runfolder.variables import without_password


def conclude(driver: SweepDriver, found: FoundTrials, progress: CollectProgress) -> Comparison:
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
    reference = _reference(driver, found)
    wish = RankingWish(reference, measure=driver.sweep.measure)
    comparison = arrange(finished, f"sweep {driver.sweep.name}", shown_uri, wish)
    gather(mlflow, driver.sweep, driver.digest, runs, comparison.verdict)
    return replace(comparison, undelivered=undelivered)


def _reference(driver: SweepDriver, found: FoundTrials) -> str | None:
    """The method that others are held against, where one of its trials was run in full."""
    for trial, reached in found.items():
        if reached.state == "succeeded" and trial.configuration.method == driver.sweep.reference:
            return driver.sweep.reference
    return None
