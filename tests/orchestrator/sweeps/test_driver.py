"""A sweep of real runs: driven by one driver after another, none of which remembers anything."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import make_job
from run_folders import claim, eval_row, steps
from training_runs import train_job

from clusters.base import Unreachable
from clusters.local import Local
from fleetune import InputError
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.progress import Decision, Reached
from orchestrator.sweeps.spec import read_sweep
from orchestrator.tracking.history import history
from runfolder.chain import last_attempt, result
from runfolder.requests import pause_step
from runfolder.site import LocalSite


def write_sweep(folder: Path, **changes: Any) -> Path:
    sweep = {
        "name": "rates",
        "job": "job.yaml",
        "axes": {"train.lr": [1e-4, 1e-2, 3e-2]},
        "rule": "asha",
        "rungs": [1 / 3],
        "budget": 1000,
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def states(found: dict[Any, Reached]) -> list[tuple[str, int]]:
    return sorted((reached.state, reached.step) for reached in found.values())


def test_a_sweep_of_real_runs_is_driven_to_its_end_and_a_rung_goes_on_bitwise(
    home: Path, tmp_path: Path, tiny_base: Path, sums: Path, held_out: Path, launch: Callable[..., None]
) -> None:
    data = {"train": str(sums), "eval": str(held_out), "seq_len": 64}
    evaluation = {"max_new_tokens": 0, "rows": 8, "before": False}
    train_job(tmp_path, tiny_base, sums, data=data, evaluation=evaluation, train={"steps": 9, "batch_tokens": 256})
    path = write_sweep(tmp_path)
    seen: list[Decision] = []
    for _ in range(6):
        decision, found = SweepDriver.of(path, None).tick()
        again, _ = SweepDriver.of(path, None).tick()
        assert not again.moves, "submitted twice"
        seen.append(decision)
        if decision.done:
            break
        for move in decision.moves:
            run_dir = home / "runs" / SweepDriver.of(path, None).run_id(move.trial)
            launch(1, run_dir)
            if result(run_dir) is None:  # as a controller does it
                last_attempt(run_dir).close({"state": "cancelled", "reason": "paused"})
    assert [len(decision.moves) for decision in seen] == [3, 1, 0]
    assert [move.until for move in seen[0].moves] == [3, 3, 3] and seen[1].moves[0].until is None
    assert states(found) == [("paused", 3), ("paused", 3), ("succeeded", 9)]
    best = seen[1].moves[0].trial
    assert found[best].scores[3] == min(reached.scores[3] for reached in found.values())
    assert sorted(found[best].scores) == [3, 6, 9]
    broken = home / "runs" / SweepDriver.of(path, None).run_id(best)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "job.yaml").write_text((broken / "job.yaml").read_text())
    (whole / "run.json").write_text((broken / "run.json").read_text())
    launch(1, whole)
    cooled = [row["eval_cooled_loss"] for row in history(broken) if "eval_cooled_loss" in row]
    assert cooled == [found[best].scores[3]] and "eval_test_loss" in history(broken)[-1]
    assert [(row["step"], row.get("loss"), row.get("eval_loss")) for row in history(broken)] == [
        (row["step"], row.get("loss"), row.get("eval_loss")) for row in history(whole)
    ]


def test_a_driver_that_died_between_a_folder_and_its_submission_is_gone_on_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
    path = write_sweep(tmp_path, rungs=[0.5])
    submitted: list[str] = []
    submit = Local.submit

    def die(self: Local, request: Any) -> Any:
        submitted.append(request.run_id)
        if len(submitted) == 2:
            raise Unreachable("killed")
        return submit(self, request)

    monkeypatch.setattr(Local, "submit", die)
    with pytest.raises(Unreachable):
        SweepDriver.of(path, None).tick()
    assert len(list((home / "runs").iterdir())) == 2
    SweepDriver.of(path, None).tick()
    found, by_trial = SweepDriver.of(path, None).look()
    assert len(found) == 3 and {status.state for status in by_trial.values()} == {"queued"}
    assert submitted.count(submitted[1]) == 2 and len(set(submitted)) == 3
    for run_dir in (home / "runs").iterdir():
        pauses = [json.loads(request.read_text())["step"] for request in (run_dir / "requests").iterdir()]
        assert pauses == [4]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("of_user", "expected"), [(None, "2"), ("5", "5")])
def test_trials_that_run_at_a_time_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_user: str | None, expected: str
) -> None:
    monkeypatch.setattr("orchestrator.sweeps.driver.cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", of_user or "")
    if of_user is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    data = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
    make_job(tmp_path, data=data, resources={"workers_per_node": 2})
    given: list[str] = []
    monkeypatch.setattr(Local, "submit", lambda *_: given.append(os.environ["OMP_NUM_THREADS"]))
    SweepDriver.of(write_sweep(tmp_path, parallel=2), None).tick()
    assert given == [expected] * 2


def test_run_ids_are_the_same_on_any_laptop(tmp_path: Path) -> None:
    ids = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        make_job(folder, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
        driver = SweepDriver.of(write_sweep(folder, methods=["lora", {"kind": "dora", "rank": 2}]), "local")
        ids.append(list(map(driver.run_id, driver.plan.trials({}))))
    assert ids[0] == ids[1] and len(set(ids[0])) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget: found 0"),
        ({"rule": "best"}, "rule: found 'best'"),
        ({"rungs": [0.5, 0.2]}, "rungs: must be shares between 0 and 1 that rise"),
        ({"axes": {"train.lr": {"log": [1, 0.1]}}}, "the smaller one first"),
        ({"name": "A b"}, "name: found 'A b'"),
        ({"sedes": [1]}, "sedes: unknown key; did you mean 'seeds'"),
        ({"seeds": [0, 1, 0]}, "seeds: must differ"),
        ({"axes": {"train.lr": []}}, "axes.*found \\[\\]"),
        ({"axes": {"train.steps": [4, 900]}}, "train.steps is no axis; what says it is the job"),
        (
            {"axes": {"train.lr": {"log": [1, 2], "cuont": 3}}},
            r"axes: train\.lr: found .*cuont.*, allowed are a list of",
        ),
        ({"axes": {"train.lr": 3}}, r"axes: train\.lr: found 3, allowed are"),
        ({"methods": [{"kind": "lora", "axes": {"train.seed": [1]}}]}, "train.seed is no axis.* is seeds"),
        ({"axes": {"method": ["lora", "dora"]}}, "method is no axis; what says it is methods"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_sweep(write_sweep(tmp_path, **changes))


def test_a_trial_that_no_job_allows_is_refused_before_any_begins(tmp_path: Path) -> None:
    make_job(tmp_path, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
    with pytest.raises(InputError, match=r"method lorra, lr 0\.0001, seed 0: method\.kind: found 'lorra'"):
        SweepDriver.of(write_sweep(tmp_path, methods=["lora", "lorra"]), None)


@pytest.mark.usefixtures("home")
def test_a_sweep_of_other_rows_does_not_take_the_trials_of_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
    path = write_sweep(tmp_path)
    monkeypatch.setattr(Local, "submit", lambda *_: None)
    SweepDriver.of(path, None).tick()
    SweepDriver.of(path, None).check_begun()
    with pytest.raises(InputError, match=r"found rates, whose run rates-\w+ was begun with test: 0\.5; allowed"):
        SweepDriver.of(write_sweep(tmp_path, test=0.25), None).run(lambda _: None)
    path = write_sweep(tmp_path)
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text() * 2)
    with pytest.raises(InputError, match=r"was begun with another data\.train and another data\.eval; allowed"):
        SweepDriver.of(path, None).run(lambda _: None)
    rows.unlink()
    SweepDriver.of(path, None).check_begun()  # on a machine without the rows


def test_a_job_without_steps_or_held_out_rows_is_refused(tmp_path: Path) -> None:
    make_job(tmp_path)
    with pytest.raises(InputError, match=r"data\.eval: found nothing"):
        SweepDriver.of(write_sweep(tmp_path), None)
    make_job(tmp_path, train={"epochs": 1, "batch_tokens": 16})
    with pytest.raises(InputError, match=r"train\.steps: found nothing"):
        SweepDriver.of(write_sweep(tmp_path), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"measure": "eval_exact_match"},
            "max_new_tokens: found 0, and measure eval_exact_match",
        ),
        (
            {"methods": ["lora", "dora"], "reference": "dorra"},
            "reference: found 'dorra'; allowed: one of",
        ),
        ({"rungs": [0.97]}, r"rungs: found \[0\.97\]; allowed: a share that is before the last of 8 steps"),
    ],
)
def test_a_sweep_whose_trials_could_not_be_judged_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
    make_job(tmp_path, data=data, evaluation={"max_new_tokens": 0}, train={"steps": 8, "batch_tokens": 16})
    with pytest.raises(InputError, match=message):
        SweepDriver.of(write_sweep(tmp_path, **changes), None)


def test_a_job_that_keeps_its_best_has_no_test_rows(tmp_path: Path) -> None:
    data = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
    make_job(tmp_path, data=data, evaluation={"every": 2, "keep": "best"})
    with pytest.raises(InputError, match="evaluation.keep best or stop_after in a sweep with test rows"):
        SweepDriver.of(write_sweep(tmp_path), None)
    driver = SweepDriver.of(write_sweep(tmp_path, test=0.0), None)
    first = driver.plan.trials({})[0]
    assert first.job(driver.sweep, driver.submitted, None)["evaluation"]["test"] == 0.0


def pause_all(path: Path, home: Path) -> None:
    """Have all trials that are queued come to their first rung, as if workers had trained them."""
    driver = SweepDriver.of(path, None)
    found, _ = driver.look()
    for place, trial in enumerate(found):
        run_dir = home / "runs" / driver.run_id(trial)
        attempt = claim(run_dir)
        steps(attempt, 1, 2)
        eval_row(attempt, 2, eval_loss=1.0 + place)
        attempt.write_verdict({"kind": "paused", "reason": "", "evidence": ""})
        attempt.close({"state": "cancelled", "reason": "paused"})
        (home / "local" / "queue" / run_dir.name).unlink(missing_ok=True)


@pytest.mark.parametrize("dies_at", ["reopened", "asked", "submitted"])
def test_a_driver_that_died_in_a_resumption_is_gone_on_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    make_job(tmp_path, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
    path = write_sweep(tmp_path, rungs=[0.3, 0.6], rule="race", finalists=1, seeds=[0], widen=False)
    SweepDriver.of(path, None).tick()
    pause_all(path, home)
    killed: list[str] = []

    def dying(function: Callable[..., Any], when: Callable[..., bool], before: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            is_last = not killed and when(*arguments)
            if is_last and before:
                killed.append(dies_at)
                raise Unreachable("killed")
            done = function(*arguments, **named)
            if is_last:
                killed.append(dies_at)
                raise Unreachable("killed")
            return done

        return call

    if dies_at == "submitted":
        monkeypatch.setattr(Local, "submit", dying(Local.submit, lambda *_: True, before=True))
    else:
        what = "reopen" if dies_at == "reopened" else "pause"
        asked = dying(LocalSite.ask, lambda _, __, asked, *___: asked == what, before=False)
        monkeypatch.setattr(LocalSite, "ask", asked)
    with pytest.raises(Unreachable):
        SweepDriver.of(path, None).tick()
    assert killed == [dies_at]
    for _ in range(2):
        SweepDriver.of(path, None).tick()
    found, by_trial = SweepDriver.of(path, None).look()
    assert states(found) == [("going", 2), ("going", 2), ("paused", 2)]
    assert {by_trial[trial].state for trial, reached in found.items() if reached.state == "going"} <= {
        "queued",
        "preempted",
    }
    for trial, reached in found.items():
        run_dir = home / "runs" / SweepDriver.of(path, None).run_id(trial)
        assert pause_step(run_dir) == (4 if reached.state == "going" else 2)


def test_a_cluster_of_this_machine_that_has_ended_is_started_while_trials_wait(
    home: Path,  # noqa: ARG001 (what is submitted waits)
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_job(tmp_path, data={"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16})
    path = write_sweep(tmp_path)
    SweepDriver.of(path, None).tick()

    def start(_: Local) -> None:
        raise Unreachable("started")

    monkeypatch.setattr(Local, "start", start)
    with pytest.raises(Unreachable, match="started"):
        SweepDriver.of(path, None).run(lambda _: None)
