"""A race of real runs from advice to the job that it recommends: minutes of work, so not in each round of tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training_runs import train_job

from orchestrator.advice.advise import advise, write_advised_job, write_race
from orchestrator.advice.race import race_file_of
from orchestrator.planning.freeze import read_job
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.result import conclude
from orchestrator.tracking.history import history
from runfolder.chain import last_attempt, result
from runfolder.requests import pause_step


@pytest.mark.soak
def test_a_race_of_real_runs_ends_with_a_job_that_can_be_submitted(
    home: Path, tmp_path: Path, tiny_base: Path, sums: Path, held_out: Path, launch: Callable[..., None]
) -> None:
    data = {"train": str(sums), "eval": str(held_out), "seq_len": 64}
    evaluation = {"max_new_tokens": 0, "before": False}
    path = train_job(
        tmp_path, tiny_base, sums, data=data, evaluation=evaluation, train={"steps": 12, "batch_tokens": 256}
    )
    advice = advise(path)
    race = write_race(advice, path, "250steps")
    assert race is not None
    driver = SweepDriver.of(race_file_of(path), None)
    for _ in range(60):
        decision, found = driver.tick()
        if decision.done:
            break
        for trial, reached in driver.look()[0].items():
            run_dir = home / "runs" / driver.run_id(trial)
            if reached.state == "going":
                launch(1, run_dir)
                if result(run_dir) is None:  # as a controller does it
                    last_attempt(run_dir).close({"state": "cancelled", "reason": "paused"})
                    assert any("eval_cooled_loss" in row for row in history(run_dir)), pause_step(run_dir)
    assert decision.done and decision.why is None, decision
    concluded = conclude(driver, found, lambda _cluster, _runs: None)
    comparison = concluded.comparison
    assert comparison.quality.key == "eval_test_loss" and comparison.verdict
    assert {each.own.rows for each in comparison.rankings[0].ranked} == {20}
    assert concluded.steps <= race.most_steps
    advised = write_advised_job(driver, found, comparison, path)
    job, _ = read_job(advised)
    assert job.method.kind in race.methods and job.train.lr
    assert yaml.safe_load(advised.read_text())["train"]["steps"] == 12
