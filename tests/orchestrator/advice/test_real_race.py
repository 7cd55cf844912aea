"""A race of real runs from advice to the job that it recommends: minutes of work, so not in each round of tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import train_job

from clusters.local import Local
from orchestrator.advice.advise import advise, write_advised_job, write_race
from orchestrator.advice.race import race_file_of
from orchestrator.planning.freeze import read_job
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.result import conclude
from orchestrator.tracking.history import history
from runfolder.chain import last_attempt, result
from runfolder.requests import pause_step


def small_job(folder: Path, base: Path, sums: Path, held_out: Path) -> Path:
    """A job of twelve steps that is judged by its loss."""
    data = {"train": str(sums), "eval": str(held_out), "seq_len": 64}
    evaluation = {"max_new_tokens": 0, "before": False}
    return train_job(folder, base, sums, data=data, evaluation=evaluation, train={"steps": 12, "batch_tokens": 256})


@pytest.mark.soak
def test_a_race_of_real_runs_ends_with_a_job_that_can_be_submitted(
    home: Path, tmp_path: Path, tiny_base: Path, sums: Path, held_out: Path, launch: Callable[..., None]
) -> None:
    path = small_job(tmp_path, tiny_base, sums, held_out)
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


@pytest.mark.soak
def test_the_command_races_on_a_real_cluster_and_goes_on_with_what_it_began(
    tmp_path: Path, tiny_base: Path, sums: Path, held_out: Path
) -> None:
    """With Ray, controllers and MLflow as a user has them: two methods on the cores of this machine."""
    home = tmp_path / "its-home"
    environment = {**os.environ, "FLEETUNE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    path = small_job(tmp_path, tiny_base, sums, held_out)

    def command(*options: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-P", "-m", "orchestrator", "advise", str(path), "--budget", "170steps", *options]
        return subprocess.run(words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    refused = command()
    assert refused.returncode == 2 and "--yes: found nothing; nothing was started" in refused.stderr
    assert not (home / "runs").exists() and not race_file_of(path).exists()
    page = tmp_path / "race.html"
    try:
        said = answer(command("--yes", "--json", "--html", str(page)))
        begun = {run.name: len(list((run / "attempts").iterdir())) for run in (home / "runs").iterdir()}
        again = answer(command("--json"))
        after = {run.name: len(list((run / "attempts").iterdir())) for run in (home / "runs").iterdir()}
    finally:
        Local(home).stop()
    assert begun == after and again["rankings"] == said["rankings"], "what was done is not done again"
    assert said["cost"]["steps"] <= 170 and said["verdict"] and "<svg" in page.read_text()
    (ranking,) = said["rankings"]
    assert ranking["measure"] == "eval_test_loss" and {row["seeds"] for row in ranking["rows"]} == {3}
    advised, _ = read_job(Path(said["job"]))
    raced = {method["kind"] for method in yaml.safe_load(race_file_of(path).read_text())["methods"]}
    assert advised.method.kind in raced and advised.train.lr and advised.train.steps == 12


def answer(done: "subprocess.CompletedProcess[str]") -> Any:
    """What a command that ended well has printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
