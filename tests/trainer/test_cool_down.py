"""A run that pauses is judged after a cool-down, of which nothing is left where it goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import curve

from runfolder.activity import phase_text
from runfolder.appended import read_lines
from runfolder.chain import Attempt
from runfolder.cooling import cool_down_steps
from runfolder.figures import read_figures
from runfolder.requests import request_pause
from trainer.meter import Meter, Timestamp, _Pending
from trainer.world import World

PAUSE = 3


def metric(run_dir: Path, attempt: int, name: str) -> dict[int, float]:
    """What an attempt reported of a metric, by the step."""
    rows = read_lines(Attempt(run_dir, attempt), "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def weights(run_dir: Path) -> bytes:
    return (run_dir / "output" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("share", "step", "expected"), [(0.0, 10, 0), (0.1, 3, 1), (0.2, 10, 2), (0.5, 90, 10), (0.2, 100, 0)]
)
def test_a_cool_down_is_a_share_of_the_steps_so_far_and_never_beyond_the_last(
    share: float, step: int, expected: int
) -> None:
    assert cool_down_steps(share, step, 100) == expected


def test_a_rung_is_judged_on_a_branch_and_continued_is_bitwise_an_unbroken_run(
    new_run: Any, launch: Any, held_out: Path
) -> None:
    """A cool-down of one step has the scheduled rate, so it comes to what the next step of an unbroken run does."""
    parts: dict[str, Any] = {
        "method": {"kind": "adalora", "rank": 2, "initial_rank": 3, "every": 1},
        "data": {"eval": str(held_out)},
        "train": {"steps": 7},
        "evaluation": {"max_new_tokens": 0, "rows": 8, "every": 1, "cool_down": 0.1},
    }
    whole, paused = new_run("whole", **parts), new_run("paused", **parts)
    launch(1, whole)
    request_pause(paused, PAUSE)
    launch(1, paused)
    cooled = metric(paused, 1, "eval_cooled_loss")
    expected = metric(whole, 1, "eval_loss")
    assert cooled == {PAUSE: expected[PAUSE + 1]} and expected[PAUSE + 1] != expected[PAUSE]
    assert list(metric(paused, 1, "loss")) == [1, 2, 3], "the branch reported its steps"
    assert read_figures(paused, 0.0).last_evaluation == {"step": PAUSE, "eval_loss": expected[PAUSE]}
    launch(1, paused)
    assert curve(paused, 1) + curve(paused, 2) == curve(whole)
    assert metric(paused, 1, "eval_loss") | metric(paused, 2, "eval_loss") == expected
    assert not metric(paused, 2, "eval_cooled_loss")
    assert weights(paused) == weights(whole)


def test_a_cool_down_that_died_is_made_anew_and_comes_to_the_same(new_run: Any, launch: Any, held_out: Path) -> None:
    evaluation = {"max_new_tokens": 0, "rows": 8, "every": PAUSE, "cool_down": 0.7}
    run = new_run(
        "cooled", data={"eval": str(held_out)}, train={"steps": 6}, evaluation=evaluation, sharding={"zero": 2}
    )
    request_pause(run, PAUSE)
    launch(2, run)
    first = metric(run, 1, "eval_cooled_loss")
    assert first[PAUSE] < metric(run, 1, "eval_loss")[PAUSE]
    told = [event for event in read_lines(Attempt(run, 1), "events.jsonl") if event["event"] == "cooling_down"]
    assert [(event["step"], event["steps"]) for event in told] == [(PAUSE, 2)] and phase_text(told[0])
    reported = run / "attempts" / "1" / "metrics.jsonl"
    *kept, last = reported.read_text().splitlines(keepends=True)
    assert "eval_cooled_loss" in last
    reported.write_text("".join(kept))
    (reported.parent / "verdict.json").unlink()
    launch(2, run)
    assert metric(run, 2, "eval_cooled_loss") == first and not metric(run, 2, "loss")
    launch(2, run)
    assert not metric(run, 3, "eval_cooled_loss"), "judged twice"


def test_what_was_asked_after_a_step_is_known_where_it_is_evaluated(tmp_path: Path) -> None:
    """On a GPU a report comes a step late: a pause at a step with an evaluation must not."""
    attempt = Attempt(tmp_path, 1)
    attempt.folder.mkdir(parents=True)
    world = World(0, 1, torch.device("cpu"))
    meter = Meter(attempt, world, 9, 1.0, 1.0)
    loss_save_stop_norm = torch.tensor([2.0, 0.0, 1.0, 0.5])
    meter._pending = _Pending(1, 1e-3, 64, 0.0, [], loss_save_stop_norm, Timestamp(world.device))
    with meter.pausing() as asked:
        assert (asked.save, asked.stop) == (False, True)
