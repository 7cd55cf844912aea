"""Advice: which methods fit and why others are left out, what a budget allows, and a race that ends with a job."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import make_job
from run_folders import claim, eval_row, steps
from typer.testing import CliRunner

from methods.options import KINDS
from orchestrator.advice.advise import Advice, advise, write_advised_job, write_race
from orchestrator.advice.evidence import Situation, rules_for, smallest_visible
from orchestrator.advice.race import budget_in_steps, race_file_of, race_of
from orchestrator.advice.what_next import what_next
from orchestrator.cli import app
from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.hours import HoursForecast
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.result import conclude
from runfolder.row_results import RowResult, write_row_results
from trainer.dry_run.process import DryRunFailed, DryRunProcess

STEPS = 20
DATA = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
TRAIN = {"steps": STEPS, "batch_tokens": 16}


def job_file(folder: Path, **changes: Any) -> Path:
    return make_job(folder, **{"data": DATA, "train": TRAIN, "resources": {"workers_per_node": 1}, **changes})


def reasons(advice: Advice) -> dict[str, str]:
    return {each.kind: each.reason for each in advice.candidates if each.reason is not None}


@pytest.mark.usefixtures("home")
def test_every_method_is_planned_or_left_out_with_a_reason(tmp_path: Path) -> None:
    advice = advise(job_file(tmp_path))
    assert {each.kind for each in advice.candidates} == set(KINDS)
    assert advice.candidates[0].kind == "lora" and advice.candidates[0].options == {"kind": "lora", "rank": 2}
    left_out = reasons(advice)
    assert "100,000,000 tokens" in left_out["full"] and "4 bits" in left_out["qlora"]
    for each in advice.racing:
        assert each.plan is not None and each.plan.method == each.kind and each.plan.sizes is not None
    assert json.loads(json.dumps(advice.to_json()))["candidates"][0]["left_out"] is None


@pytest.mark.usefixtures("home")
def test_what_does_not_fit_is_dropped_and_lines_suffice_where_there_is_no_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def no_dry_run(*_: Any) -> Any:
        tried.append("dry run")
        raise DryRunFailed("not here")

    monkeypatch.setattr(DryRunProcess, "ask", no_dry_run)
    tight = advise(job_file(tmp_path), gpu="0.2")
    assert reasons(tight)["lora"].startswith("too large for 205 MiB")
    by_question = {rule.question: rule.advice for rule in tight.rules}
    assert by_question["a base in 4 bits"] == "neither lora in 16 bits nor qlora fits here"
    before = len(tried)
    ample = advise(job_file(tmp_path), gpu="24")
    by_question = {rule.question: rule.advice for rule in ample.rules}
    assert "lora" not in reasons(ample) and "do not take qlora" in by_question["a base in 4 bits"]
    assert len(tried) - before <= 3, "of methods without a line alone"


@pytest.mark.usefixtures("home")
def test_advice_ends_with_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.planning.memory.can_dry_run", lambda: False)
    monkeypatch.setattr("orchestrator.planning.plan.can_dry_run", lambda: False)
    path = job_file(tmp_path)
    planned: list[tuple[str, int, int]] = []
    advice = advise(path, gpu="H100", begun=lambda *method: planned.append(method))
    assert planned[0] == ("lora", 1, len(KINDS)) and len(planned) == len(KINDS)
    step = what_next(advice, path)
    command = re.escape(f"fleetune advise {path} --budget ")
    found = re.match(rf"{command}(\d+)steps races lora, .*; with less", step)
    assert found is not None
    assert write_race(advice, path, f"{found[1]}steps") is not None
    least = re.search(r"from ([\d,]+) steps on", step)
    assert least is not None
    few = int(least[1].replace(",", ""))
    assert len(race_of(advice.job, advice.racing, few, path).methods) == 2
    with pytest.raises(InputError):
        race_of(advice.job, advice.racing, few - 1, path)
    nothing = replace(advice, candidates=[replace(each, reason="no") for each in advice.candidates])
    assert what_next(nothing, path).startswith("no method fits")
    alone = replace(advice, candidates=advice.candidates[:1])
    assert what_next(alone, path).startswith("lora is what is left: fleetune submit")
    unjudged = job_file(tmp_path, data={**DATA, "eval": None})
    assert "data.eval" in what_next(advise(unjudged, gpu="H100"), unjudged)


@pytest.mark.usefixtures("home")
def test_the_change_that_lets_a_method_fit_is_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU between what LoRA takes with micro-batches of 64 rows and what it takes with smaller ones."""
    monkeypatch.setattr("orchestrator.planning.memory.can_dry_run", lambda: False)
    monkeypatch.setattr("orchestrator.planning.plan.can_dry_run", lambda: False)
    train = {"steps": STEPS, "batch_tokens": 2048 * 64, "micro_batch": 2048}
    path = job_file(tmp_path, data={**DATA, "seq_len": 64}, train=train)
    advice = advise(path, gpu="0.7")
    foretold = [each for each in advice.candidates if each.plan is not None and each.plan.fit is not None]
    step = what_next(replace(advice, candidates=foretold), path)
    assert step.startswith("train.micro_batch=1024 in the job, with which lora takes ")
    shown = CliRunner().invoke(app, ["advise", str(path), "--gpu", "0.7"])
    assert "~" in shown.output and "next: " in shown.output


def test_each_rule_has_a_source_and_a_strength_and_depends_on_the_situation() -> None:
    rates = {kind: options().rate(2048) for kind, options in KINDS.items()} | {"lora": 4e-4}
    small = Situation(rates, 1_200_000_000, 10_000_000, 64.0, 200, None, None, None, None)
    rules = rules_for(small)
    assert all(rule.source and rule.strength in ("strong", "medium", "weak", "folklore") for rule in rules)
    by_question = {rule.question: rule.advice for rule in rules}
    assert "5.1 %" in by_question["the rank"] and "0.00012 and 0.0012" in by_question["the rate of LoRA"]
    assert "64 sequences" in by_question["the batch"] and "take an adapter" in by_question["full or an adapter"]
    full, tenth = f"{rates['full']:.2g}", "4e-05"
    assert by_question["the rate of full"].startswith(f"start at {full}, and try {tenth}")
    large = Situation(rates, 70_000_000_000, 10**9, 8.0, None, False, None, True, None)
    by_question = {rule.question: rule.advice for rule in rules_for(large)}
    assert "0.7 %" in by_question["the rank"] and "the batch" not in by_question
    assert "try full" in by_question["full or an adapter"] and "hold out rows" in by_question["judging"]
    assert "take qlora" in by_question["a base in 4 bits"]
    checkpointed = replace(large, lora_fits=True, lora_change="train.gradient_checkpointing=true")
    by_rule = {rule.question: rule.advice for rule in rules_for(checkpointed)}
    assert "fits with train.gradient_checkpointing=true: do not take qlora" in by_rule["a base in 4 bits"]
    too_large = {rule.question: rule.advice for rule in rules_for(replace(large, full_fits=False))}
    assert "full does not fit" in too_large["full or an adapter"]


def test_the_smallest_visible_difference_is_that_of_the_formula() -> None:
    """19,615 rows show one point where models disagree on a quarter of them, and 1,319 rows 3.9 points."""
    assert smallest_visible(19_615) == pytest.approx(0.01, rel=1e-3)
    assert smallest_visible(1319) == pytest.approx(0.0386, rel=0.01)


@pytest.mark.usefixtures("home")
def test_a_budget_decides_how_many_methods_are_raced_and_how_well(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    advice = advise(path)
    job, _ = read_job(path)
    found = [race_of(job, advice.racing, budget, path) for budget in (300, 700, 2000)]
    assert [len(race.methods) for race in found] == sorted(len(race.methods) for race in found)
    assert all(race.methods[0] == "lora" and len(race.methods) >= 2 for race in found)
    assert len(found[-1].methods) == len(advice.racing) and len(found[-1].sweep["seeds"]) == 5
    for budget, race in zip((300, 700, 2000), found, strict=True):
        assert race.most_steps <= budget == race.sweep["budget"]
    assert {race.sweep["reference"] for race in found} == {"lora"}
    with pytest.raises(InputError, match=r"--budget: found 50 steps; allowed: \d+ or more, which a race of lora and"):
        race_of(job, advice.racing, 50, path)
    others = [each for each in advice.racing if each.kind != "lora"]
    assert race_of(job, others, 2000, path).sweep["reference"] == others[0].kind
    with pytest.raises(InputError, match="fewer than two methods"):
        race_of(job, others[:1], 2000, path)


@pytest.mark.usefixtures("home")
def test_budgets_in_hours_need_a_forecast_and_others_are_refused(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    advice = advise(path)
    assert budget_in_steps("700steps", advice.job, advice.racing) == 700
    with pytest.raises(InputError, match=r"--budget: found '6gpuh', and nobody knows how long lora takes here"):
        budget_in_steps("6gpuh", advice.job, advice.racing)
    with pytest.raises(InputError, match=r"--budget: found 'much'; allowed: hours of GPUs like 6gpuh"):
        budget_in_steps("much", advice.job, advice.racing)


@pytest.mark.usefixtures("home")
def test_hours_of_gpus_are_steps_of_the_slowest_method(tmp_path: Path) -> None:
    """Of 20 steps in 0.4 hours on each of two workers, six hours of GPUs are 150."""
    advice = advise(job_file(tmp_path, resources={"workers_per_node": 2}))
    timed = []
    for place, candidate in enumerate(advice.racing[:2], 1):
        assert candidate.plan is not None
        hours = HoursForecast(0.1, 0.2 * place, 0.9, 0)
        timed.append(replace(candidate, plan=replace(candidate.plan, hours=hours)))
    assert budget_in_steps("6gpuh", advice.job, timed) == 150
    assert budget_in_steps("6gpuh", advice.job, timed[:1]) == 300


def test_nothing_is_started_before_somebody_agrees(tmp_path: Path, home: Path) -> None:
    path = job_file(tmp_path)
    refused = CliRunner().invoke(app, ["advise", str(path), "--budget", "700steps"])
    assert isinstance(refused.exception, InputError) and "nothing was started" in str(refused.exception)
    assert not race_file_of(path).exists() and not list((home / "runs").glob("*"))
    without_race = CliRunner().invoke(app, ["advise", str(path), "--html", "page.html"])
    assert "--html: a report is of a race" in str(without_race.exception)


def pretend(driver: SweepDriver, home: Path, losses: dict[str, float]) -> None:
    """Have every trial that goes on come to its pause or its end, with a loss by its method and its seed."""
    found, _ = driver.look()
    for trial, reached in found.items():
        if reached.state != "going":
            continue
        run_dir = home / "runs" / driver.run_id(trial)
        until = driver.plan.pause_of(trial, found) or STEPS
        attempt = claim(run_dir, reached.step or None)
        steps(attempt, reached.step + 1, until)
        attempt.event("plan", steps=STEPS, parameters=9, trained=9, data={})
        loss = losses[trial.configuration.method] + 0.001 * trial.seed + 1 / until
        rows = [RowResult(row, f"{row:x}", loss + 0.01 * (row % 7), 1.0) for row in range(40)]
        figures = {"eval_loss": loss}
        if until == STEPS:
            rows += [RowResult(row, f"{row:x}", loss + 0.01 * (row % 7), 1.0, test=True) for row in range(40, 80)]
            figures["eval_test_loss"] = loss
        write_row_results(attempt, until, rows)
        eval_row(attempt, until, **figures)
        if until == STEPS:
            attempt.write_verdict({"kind": "success", "reason": "", "evidence": ""})
            attempt.close({"state": "succeeded", "reason": None})
        else:
            attempt.write_verdict({"kind": "paused", "reason": "", "evidence": ""})
            attempt.close({"state": "cancelled", "reason": "paused"})
        (home / "local" / "queue" / run_dir.name).unlink(missing_ok=True)


def test_a_race_ends_with_the_job_that_won(tmp_path: Path, home: Path) -> None:
    path = job_file(tmp_path)
    advice = advise(path)
    race = write_race(advice, path, "300steps")
    assert race is not None and write_race(advice, path, "700steps") is None, "a race that was begun is gone on with"
    losses = dict.fromkeys(race.methods, 2.0) | {race.methods[1]: 1.5}
    driver = SweepDriver.of(race_file_of(path), None)
    for _ in range(40):
        decision, found = driver.tick()
        if decision.done:
            break
        pretend(driver, home, losses)
    assert decision.done and decision.why is None
    result = conclude(driver, found, lambda _cluster, _runs: None)
    assert result.comparison.quality.key == "eval_test_loss"
    assert result.comparison.verdict and result.comparison.verdict.startswith(f"{race.methods[1]} (")
    advised = write_advised_job(driver, found, result.comparison, path)
    assert advised == tmp_path / "job-advised.yaml"
    job, _ = read_job(advised)
    assert job.method.kind == race.methods[1] and job.train.lr is not None
    assert yaml.safe_load(advised.read_text())["data"] == DATA
    assert result.steps <= race.most_steps and result.device_hours > 0
