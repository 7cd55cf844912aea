"""What a run has measured, and where its time went: exact figures of small invented runs."""

import json
import os
import time
from math import nan
from pathlib import Path
from typing import Any

import pytest
from run_folders import T0, claim, eval_row, make_run, steps

from runfolder.chain import close, reopen
from runfolder.figures import Figures, figures_of
from runfolder.goodput import Goodput, SlotTimes, StepTime, goodput
from runfolder.snapshot import Snapshot, snapshot


def attempt(taken: float, first: int, times: list[float], **ended: Any) -> SlotTimes:
    """An attempt that reported steps from `first` on at these times."""
    done = [StepTime(step, time) for step, time in enumerate(times, first)]
    return SlotTimes("attempt", taken, done, times[-1] if times else None, **ended)


def ended(kind: str, time: float) -> dict[str, Any]:
    return {"kind": kind, "time": time}


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], Goodput(queued=100)),
        ([attempt(10, 1, [])], Goodput(queued=10, starting=90)),
        ([attempt(10, 1, [30, 40, 60])], Goodput(queued=10, starting=20, training=70)),
        (
            [attempt(10, 1, [30, 40], verdict=ended("success", 55)), SlotTimes("close", 55)],
            Goodput(queued=10, starting=20, training=25),
        ),
        # A worker died after step 2: it waits five seconds for the next attempt, which does step 2 again.
        (
            [attempt(10, 1, [20, 30], verdict=ended("node_lost", 45)), attempt(50, 2, [60, 75, 80])],
            Goodput(queued=15, starting=20, training=50, stalled=15),
        ),
        (
            [attempt(10, 1, [20, 30, 40], verdict=ended("hang", 40)), attempt(50, 2, [60, 75, 80])],
            Goodput(queued=20, starting=20, training=45, repeated=15),
        ),
        # The controller was killed: nobody knew before the next attempt was claimed.
        (
            [attempt(10, 1, [20, 30]), attempt(50, 3, [60])],
            Goodput(queued=10, starting=20, training=50, stalled=20),
        ),
        # A scheduler gave it nodes at 10, took them for others at 40, and gave it nodes again at 65.
        (
            [
                attempt(15, 1, [20, 30], verdict=ended("preemption", 40), granted=10),
                attempt(70, 3, [80], granted=65),
            ],
            Goodput(queued=35, starting=25, training=40),
        ),
        # The node of the controller died, and the job was started again.
        (
            [attempt(15, 1, [20, 30], granted=10), attempt(60, 3, [80], granted=50)],
            Goodput(queued=10, starting=40, training=30, stalled=20),
        ),
        # It failed before its first step, was closed, and reopened much later.
        (
            [
                attempt(10, 1, [], verdict=ended("user_error", 20)),
                SlotTimes("close", 21),
                SlotTimes("reopen", 80),
                attempt(90, 1, []),
            ],
            Goodput(queued=21, starting=20),
        ),
        ([SlotTimes("close", 30)], Goodput(queued=30)),
    ],
)
def test_every_second_counts_once(slots: list[SlotTimes], expected: Goodput) -> None:
    assert goodput(0.0, slots, now=100.0) == expected


def test_an_evaluation_after_the_last_step_is_no_stall() -> None:
    broken = SlotTimes("attempt", 0, [StepTime(1, 10)], last_row=25, verdict=ended("network", 40))
    assert goodput(0.0, [broken], now=40.0) == Goodput(starting=10, training=15, stalled=15)


def test_clocks_that_differ_make_no_negative_time() -> None:
    spent = goodput(50.0, [attempt(48, 1, [60], verdict=ended("success", 59))], now=59.0)
    assert spent == Goodput(starting=12)


def row(step: int, time: float, **metrics: float) -> dict[str, float]:
    return {"step": step, "time": time, **metrics}


def test_speed_is_that_of_the_newest_attempt_and_evaluations_are_those_of_all() -> None:
    early = [row(0, 0, eval_loss=3.0), row(10, 5, loss=1.0, tokens_per_second=9e9), row(10, 6, eval_loss=0.5)]
    late = [
        row(11, 100, loss=1.0, tokens_per_second=10.0, peak_memory_bytes=7),
        row(12, 101, loss=1.0, tokens_per_second=30.0, peak_memory_bytes=8),
        row(13, 108, loss=1.0, tokens_per_second=20.0, peak_memory_bytes=9),
        row(13, 109, eval_loss=0.7),
        row(14, 110, eval_loss=nan),
    ]
    found = figures_of(Goodput(), early + late, late, now=111.0)
    assert (found.tokens_per_second, found.seconds_per_step, found.since_last_step_s) == (20.0, 4.0, 3.0)
    assert found.peak_memory_bytes == 9
    assert found.best_evaluation == {"step": 10, "eval_loss": 0.5}
    assert found.last_evaluation and found.last_evaluation["step"] == 14


def test_more_exact_matches_are_better_than_less_loss() -> None:
    rows = [row(5, 1, eval_loss=0.1, eval_exact_match=0.2), row(9, 2, eval_loss=0.4, eval_exact_match=0.3)]
    assert figures_of(Goodput(), rows, rows, 2.0).best_evaluation == {
        "step": 9,
        "eval_loss": 0.4,
        "eval_exact_match": 0.3,
    }


def test_a_run_without_rows_has_no_figures() -> None:
    assert figures_of(Goodput(queued=3), [], [], 0.0) == Figures(Goodput(queued=3))


def test_one_step_has_a_speed_and_no_duration() -> None:
    rows = [row(1, 1, loss=1.0, tokens_per_second=5.0)]
    found = figures_of(Goodput(), rows, rows, 1.0)
    assert (found.tokens_per_second, found.seconds_per_step) == (5.0, None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that failed once, was reopened, and goes on."""
    run_dir = make_run(tmp_path, "fake-0000000001", None)
    first = claim(run_dir)
    steps(first, 1, 4)
    eval_row(first, 4, eval_loss=2.0)
    first.write_verdict({"kind": "user_error", "reason": "boom"})
    close(run_dir, {"state": "failed", "reason": "boom"})
    reopen(run_dir)
    second = claim(run_dir, start=2)
    steps(second, 3, 6)
    return run_dir


def test_a_full_view_has_what_a_glance_leaves_out(run: Path) -> None:
    assert snapshot(run).figures is None
    found = snapshot(run, in_full=True)
    assert found.figures and found.figures.last_evaluation == {"step": 4, "eval_loss": 2.0}
    assert found.figures.seconds_per_step == 1.0
    assert found.figures.goodput.repeated == 1.0  # step 4, as step 3 is the first that the attempt reported
    assert found.figures.goodput.queued > 0 and found.submitted == T0


def test_a_run_is_queued_until_its_batch_job_begins(tmp_path: Path) -> None:
    now = time.time()
    run_dir = make_run(tmp_path, "fake-0000000001", None)
    (run_dir / "starts").mkdir()
    (run_dir / "starts" / "1.0").touch()
    os.utime(run_dir / "starts" / "1.0", (now, now - 100))
    claim(run_dir)
    figures = snapshot(run_dir, in_full=True).figures
    assert (
        figures
        and figures.goodput.queued == pytest.approx(now - 100 - T0, rel=1e-12)
        and figures.goodput.starting >= 100
    )
    close(run_dir, {"state": "failed", "reason": "boom"})
    reopen(run_dir)
    claim(run_dir)  # by the same job
    again = snapshot(run_dir, in_full=True).figures
    assert again and again.goodput.starting < figures.goodput.starting + 100


def test_a_snapshot_goes_through_json(run: Path) -> None:
    for in_full in (False, True):
        found = snapshot(run, in_full)
        assert Snapshot.load(json.loads(json.dumps(found.dump()))) == found


def test_rows_behind_the_seal_of_a_paused_attempt_count_for_nothing(run: Path) -> None:
    before = snapshot(run, in_full=True).figures
    (run / "attempts" / "1" / "metrics.jsonl").open("a").write('{"step": 9, "time": 1, "eval_loss": 0.0}\n')
    after = snapshot(run, in_full=True).figures
    assert before and after and after.best_evaluation == before.best_evaluation


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], []),
        (["README.md"], []),
        (
            ["config.json"],
            [
                "model = AutoModelForCausalLM.from_pretrained('{output}')",
                "tokenizer = AutoTokenizer.from_pretrained('{output}')",
            ],
        ),
        (
            ["adapter_config.json"],
            [
                "model = AutoModelForCausalLM.from_pretrained('org/base', revision='v2')",
                "model = PeftModel.from_pretrained(model, '{output}')",
            ],
        ),
        (
            ["adapter_config.json", "config.json"],
            [
                "model = AutoModelForCausalLM.from_pretrained('org/base', revision='v2', "
                "config=AutoConfig.from_pretrained('{output}'))",
                "model = PeftModel.from_pretrained(model, '{output}')",
            ],
        ),
    ],
)
def test_an_output_says_how_it_is_loaded(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    run_dir = make_run(tmp_path, "fake-0000000001", None, base={"model": "org/base", "revision": "v2"})
    output = run_dir / "output"
    output.mkdir()
    for name in files:
        (output / name).touch()
    found = snapshot(run_dir, in_full=True).loading
    assert list(found) == [line.format(output=output) for line in expected]
