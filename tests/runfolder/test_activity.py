"""What a run is doing now, as its folder tells it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import claim, eval_row, make_run, plan, step_row

from runfolder.activity import Activity, activity_of
from runfolder.chain import Attempt, close, reopen
from runfolder.snapshot import Snapshot, snapshot


def event(kind: str, timestamp: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": timestamp, **fields}


def evaluating(timestamp: float, done: int) -> dict[str, Any]:
    return event("evaluating", timestamp, step=20, began=30.0, what="rows", done=done, total=1500)


START = [event("claimed", 1.0), event("workers_up", 2.0), event("loading_base", 3.0)]
READY = [*START, event("base_loaded", 8.0), event("plan", 9.0)]
SAVING = [*READY, event("saving", 25.0, step=20)]
ROW = {"step": 20, "time": 24.0, "loss": 1.0}


@pytest.mark.parametrize(
    ("events", "row", "expected"),
    [
        ([], None, None),
        (START[:1], None, Activity("starting the workers", 1.0, 1.0)),
        (START[:2], None, Activity("reading the data", 2.0, 2.0)),
        (START, None, Activity("loading the base", 3.0, 3.0)),
        (READY[:4], None, Activity("preparing the model", 8.0, 8.0)),
        (READY, None, Activity("training the first step", 9.0, 9.0)),
        (READY, ROW, Activity("training step 21", 24.0, 24.0)),
        ([*READY, evaluating(30.0, 0)], ROW, Activity("evaluating after step 20: 0 of 1,500 rows", 30.0, 30.0)),
        (
            [*READY, evaluating(30.0, 0), event("sample", 35.0), evaluating(40.0, 64)],
            ROW,
            Activity("evaluating after step 20: 64 of 1,500 rows", 30.0, 40.0),
        ),
        ([*READY, evaluating(30.0, 0)], {**ROW, "time": 50.0}, Activity("training step 21", 50.0, 50.0)),
        # A save goes on while steps are taken; after the last step it is waited for.
        (
            SAVING,
            {**ROW, "step": 21, "time": 26.0},
            Activity("training step 22, while the checkpoint of step 20 is being saved", 26.0, 26.0),
        ),
        ([*SAVING, event("checkpoint", 27.0)], ROW, Activity("training step 21", 24.0, 27.0)),
        (
            [*READY, event("saving", 61.0, step=40)],
            {**ROW, "step": 40},
            Activity("saving the checkpoint of step 40", 61.0, 61.0),
        ),
        (READY, {**ROW, "step": 40}, Activity("ending the last step", 24.0, 24.0)),
        ([*READY, event("exporting", 70.0)], ROW, Activity("exporting the output", 70.0, 70.0)),
        ([*READY, event("exported", 71.0)], ROW, Activity("checking the output", 71.0, 71.0)),
        ([*READY, event("merging", 72.0)], ROW, Activity("merging the adapter into the base", 72.0, 72.0)),
        ([*READY, event("tracking_outage", 99.0)], ROW, Activity("training step 21", 24.0, 99.0)),
    ],
)
def test_what_is_done_now(
    events: list[dict[str, Any]], row: dict[str, Any] | None, expected: Activity | None
) -> None:
    assert activity_of(events, row, 40, 0.0) == expected


def test_work_that_writes_nothing_is_a_sign_of_life() -> None:
    assert activity_of(START, None, 40, 77.0) == Activity("loading the base", 3.0, 77.0)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return claim(make_run(tmp_path, "fake-0000000001", None))


def doing(attempt: Attempt) -> str | None:
    """What the run of an attempt does, also as it comes out of JSON."""
    plain = json.dumps(snapshot(attempt.run_dir).dump())
    seen = Snapshot.load(json.loads(plain))
    assert seen.damaged is None
    return seen.activity.doing if seen.activity else None


def test_a_look_at_a_run_says_what_it_does(attempt: Attempt) -> None:
    assert doing(attempt) is None
    before = time.time()
    attempt.event("loading_base")
    seen = snapshot(attempt.run_dir).activity
    assert seen and before <= seen.since == seen.moved <= time.time()
    assert doing(attempt) == "loading the base"
    attempt.note_progress()
    os.utime(attempt.folder / "alive", (5e9, 5e9))
    seen = snapshot(attempt.run_dir).activity
    assert seen and seen.moved == 5e9
    plan(attempt)
    step_row(attempt, 100, time=6e9)
    eval_row(attempt, 100)
    assert doing(attempt) == "training the first step"  # by the invented time of the evaluation
    step_row(attempt, 100, time=6e9)
    assert doing(attempt) == "ending the last step"


def test_the_newest_events_of_many_are_read(attempt: Attempt) -> None:
    attempt.event("plan", steps=100)
    for step in range(1, 400):
        attempt.event("sample", step=step, prompt="x" * 500)
    attempt.event("exporting")
    assert doing(attempt) == "exporting the output"


def test_an_attempt_that_has_ended_does_nothing(attempt: Attempt) -> None:
    attempt.event("exporting")
    assert close(attempt.run_dir, {"state": "failed", "reason": "boom"})
    assert doing(attempt) is None
    assert reopen(attempt.run_dir)
    assert doing(attempt) is None
    second = claim(attempt.run_dir)
    second.event("loading_base")
    assert doing(second) == "loading the base"
    second.write_verdict({"kind": "node_lost", "reason": "gone"})
    assert doing(second) is None
