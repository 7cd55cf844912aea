"""A trainer that is asked to stop saves, returns, and goes on from there bit for bit."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_runs import curve
from sampling import each_sampled

from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts, result
from runfolder.files import read_json
from runfolder.requests import Stop, request_pause, request_stop


@pytest.mark.parametrize("zero", each_sampled([0, 3]))
def test_a_run_that_was_paused_and_stopped_is_the_undisturbed_one(
    new_run: Callable[..., Path], launch: Callable[..., None], zero: int
) -> None:
    parts = {"sharding": {"zero": zero}, "train": {"steps": 12}}
    whole, paused, stopped = (new_run(f"{name}-{zero}", **parts) for name in ("whole", "paused", "stopped"))
    request_pause(paused, 5)
    asked = threading.Thread(target=ask_at_once, args=(stopped,))
    asked.start()
    launch(2, whole, paused, stopped)
    asked.join()
    assert result(paused) is result(stopped) is None
    at = {run.name: saved(run) for run in (paused, stopped)}
    assert at[paused.name] == 5 and 1 <= at[stopped.name] < 12
    launch(2, paused, stopped)
    for run in (paused, stopped):
        first, second = attempts(run)
        assert second.start and second.start.step == at[run.name]
        assert [row["step"] for row in read_lines(first, "metrics.jsonl") if "loss" in row][-1] == at[run.name]
        assert curve(run, 1)[: at[run.name]] + curve(run, 2) == curve(whole, 1)


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


def warn_within_a_step(run_dir: Path, grace_s: float) -> tuple[float, int]:
    """Warn the first attempt one second after it reported a step; gives when, and the last step that it reported."""
    attempt, deadline = Attempt(run_dir, 1), time.monotonic() + 250
    while not attempts(run_dir) or len(read_lines(attempt, "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    now = time.time()
    request_stop(attempt, Stop("preemption", "the test wants it", now + grace_s))
    return now, int(read_lines(attempt, "metrics.jsonl")[-1]["step"])


def ask_at_once(run_dir: Path) -> None:
    """Ask the first attempt to stop as soon as there is one, as its controller would."""
    deadline = time.monotonic() + 250
    while not attempts(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    request_stop(Attempt(run_dir, 1), Stop("preemption", "the test wants it", time.time() + 60))


def saved(run_dir: Path) -> int:
    """The step at which the first attempt stopped, which has a checkpoint."""
    (event,) = [event for event in read_lines(Attempt(run_dir, 1), "events.jsonl") if event["event"] == "stopped"]
    folder = run_dir / "attempts" / "1" / "checkpoints" / f"step-{event['step']}"
    assert read_json(folder / "manifest.json")["step"] == event["step"]
    return int(event["step"])
