"""A trainer that is asked to stop saves, returns, and goes on from there bit for bit."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import curve
from sampling import each_sampled
from waiting import until

from runfolder import chain
from runfolder.appended import read_lines
from runfolder.chain import Attempt, Start, attempts, result
from runfolder.files import read_json
from runfolder.requests import Stop, request_pause, request_stop
from trainer.stop import Stopped, StopRequests
from trainer.world import World


@pytest.mark.parametrize("zero", each_sampled([0, 3]))
def test_a_run_that_was_paused_and_stopped_is_the_undisturbed_one(
    new_run: Callable[..., Path], launch: Callable[..., None], zero: int
) -> None:
    parts = {"sharding": {"zero": zero}, "train": {"steps": 8}}
    whole, paused = (new_run(f"{name}-{zero}", **parts) for name in ("whole", "paused"))
    stopped = new_run(f"stopped-{zero}", objective="steady", **parts)  # so that it is not done when it is asked
    request_pause(paused, 5)
    asked = threading.Thread(target=ask_after_a_step, args=(stopped,))
    asked.start()
    launch(2, whole, paused, stopped)
    asked.join()
    assert result(paused) is result(stopped) is None
    at = {run.name: saved(run) for run in (paused, stopped)}
    assert at[paused.name] == 5 and 1 <= at[stopped.name] < 8
    forget_the_pause(paused)
    launch(2, paused)
    assert result(paused) is None and not (attempts(paused)[1].folder / "metrics.jsonl").exists()
    launch(2, paused, stopped)
    for run in (paused, stopped):
        first, *_, last = attempts(run)
        assert last.start and last.start.step == at[run.name]
        assert [row["step"] for row in read_lines(first, "metrics.jsonl") if "loss" in row][-1] == at[run.name]
        assert curve(run, 1)[: at[run.name]] + curve(run, last.number) == curve(whole, 1)


@pytest.mark.parametrize("zero", each_sampled([0, 3]))
def test_a_warning_in_the_middle_of_a_slow_step_leaves_a_checkpoint_within_the_grace_time(
    new_run: Callable[..., Path], launch: Callable[..., None], zero: int
) -> None:
    """A step takes two seconds, and ten are given; what was reported is saved."""
    run_dir = new_run("slow", objective="slow", sharding={"zero": zero}, train={"steps": 100})
    asked: list[tuple[float, int]] = []
    warning = threading.Thread(target=lambda: asked.append(warn_within_a_step(run_dir, grace_s=10.0)))
    warning.start()
    launch(2, run_dir)
    warning.join()
    ((at, reported),) = asked
    (saved_at,) = [row for row in read_lines(Attempt(run_dir, 1), "events.jsonl") if row["event"] == "checkpoint"]
    assert saved_at["time"] - at < 10
    assert reported <= saved(run_dir) <= reported + 3


def forget_the_pause(run_dir: Path) -> None:
    """Leave the first attempt as if it had died once its last step was saved."""
    verdict = run_dir / "attempts" / "1" / "verdict.json"
    assert read_json(verdict)["kind"] == "paused"
    verdict.unlink()


def test_a_pause_that_is_asked_for_too_late_comes_at_once(tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    chain.claim_next(tmp_path, None)
    second = chain.claim_next(tmp_path, Start(1, 50))
    assert second
    request_pause(tmp_path, 5)
    assert StopRequests(second, world).wanted(100)
    third = chain.claim_next(tmp_path, Start(2, 100))
    assert third
    with pytest.raises(Stopped) as stopped:
        StopRequests(third, world).leave_before_first()
    assert stopped.value.step == 100
    third.write_verdict({"kind": "paused"})
    fourth = chain.claim_next(tmp_path, Start(3, 100))
    assert fourth and not StopRequests(fourth, world).wanted(101)
    request_pause(tmp_path, 5)
    assert StopRequests(fourth, world).wanted(101)


@pytest.mark.parametrize("steps", [2, 4])
def test_an_evaluation_that_a_warning_ends_is_done_by_the_next_attempt(
    new_run: Callable[..., Path], launch: Callable[..., None], held_out: Path, steps: int
) -> None:
    """Of step 2, in the middle or at the end: several batches, of which none begins after the warning."""
    evaluation = {"every": 2, "before": False, "max_new_tokens": 0}
    parts = {"data": {"eval": str(held_out)}, "train": {"steps": steps, "micro_batch": 1}, "evaluation": evaluation}
    whole = new_run("whole", **parts)
    warned = new_run("warned", objective="slowly_judged", **parts)
    warning = threading.Thread(target=warn_in_evaluation, args=(warned, 2))
    warning.start()
    launch(2, whole, warned)
    warning.join()
    assert saved(warned) == 2 and result(warned) is None
    assert not any("eval_loss" in row for row in read_lines(Attempt(warned, 1), "metrics.jsonl"))
    launch(2, warned)
    evaluations = {
        run.name: {
            row["step"]: row["eval_loss"]
            for attempt in attempts(run)
            for row in read_lines(attempt, "metrics.jsonl")
            if "eval_loss" in row
        }
        for run in (whole, warned)
    }
    assert evaluations["warned"] == evaluations["whole"] and 2 in evaluations["whole"]
    assert curve(warned, 1) + (curve(warned, 2) if steps > 2 else []) == curve(whole, 1)


def warn_in_evaluation(run_dir: Path, step: int) -> None:
    """Warn the first attempt once it has reported a step after which it evaluates."""
    attempt = Attempt(run_dir, 1)
    until(lambda: attempts(run_dir) and len(read_lines(attempt, "metrics.jsonl")) == step, timeout_s=250)
    request_stop(attempt, Stop("preemption", "the test wants it", time.time() + 60))


def warn_within_a_step(run_dir: Path, grace_s: float) -> tuple[float, int]:
    """Warn the first attempt one second after it reported a step; gives when, and the last step that it reported."""
    attempt, deadline = Attempt(run_dir, 1), time.monotonic() + 250
    while not attempts(run_dir) or not read_lines(attempt, "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    now = time.time()
    request_stop(attempt, Stop("preemption", "the test wants it", now + grace_s))
    return now, int(read_lines(attempt, "metrics.jsonl")[-1]["step"])


def ask_after_a_step(run_dir: Path) -> None:
    """Ask the first attempt to stop as soon as it has reported a step, as its controller would."""
    attempt = Attempt(run_dir, 1)
    until(lambda: attempts(run_dir) and read_lines(attempt, "metrics.jsonl"), timeout_s=250)
    request_stop(attempt, Stop("preemption", "the test wants it", time.time() + 60))


def saved(run_dir: Path) -> int:
    """The step at which the first attempt stopped, which has a checkpoint."""
    (event,) = [event for event in read_lines(Attempt(run_dir, 1), "events.jsonl") if event["event"] == "stopped"]
    folder = run_dir / "attempts" / "1" / "checkpoints" / f"step-{event['step']}"
    assert read_json(folder / "manifest.json")["step"] == event["step"]
    return int(event["step"])
