"""What ends an attempt beside its workers, and what the history of a run is. A sleeping process stands for Ray's."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import until

from orchestrator.controller import attempt_endings, cancelled_within, main, next_step, result_of
from orchestrator.driver import failures_of
from orchestrator.failure import Failure
from orchestrator.verdict import Again, Final, VerdictKind
from orchestrator.watch import Watch
from runfolder.chain import Attempt, Fenced, Start, claim_next, close, last_slot, reopen, result
from runfolder.files import write_json
from runfolder.requests import pause_step, request_cancel, request_pause, stop_requested


class Sleeper:
    """A driver that goes on for ever, or has ended."""

    def __init__(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that listens where the Ray head would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make(tmp_path / "run")


def make(folder: Path, **resources: Any) -> Path:
    folder.mkdir()
    job = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}, "resources": resources}
    (folder / "job.yaml").write_text(yaml.safe_dump({"job": job}))
    return folder


def claim(run_dir: Path, start: Start | None = None) -> Attempt:
    attempt = claim_next(run_dir, start)
    assert attempt
    return attempt


def save(attempt: Attempt, step: int) -> None:
    folder = attempt.folder / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {})


def watch(attempt: Attempt, exit_code: int | None = None, stop: bool = False) -> Watch:
    event = threading.Event()
    if stop:
        event.set()
    return Watch(attempt, Sleeper(exit_code), event)  # type: ignore[arg-type]


@pytest.mark.usefixtures("head")
def test_silence_is_a_hang(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HANG_AFTER", "1")
    attempt = claim(run_dir)
    (attempt.folder / "logs").mkdir()
    (attempt.folder / "logs" / "rank-0.log").write_text("step 1\nstep 2\n")
    began = time.monotonic()
    verdict = watch(attempt).until_end()
    assert (verdict.kind, verdict.evidence) == ("hang", "step 2")
    assert time.monotonic() - began >= 1


@pytest.mark.usefixtures("head")
def test_what_is_written_is_a_sign_of_life_whatever_the_clock_of_the_file_server(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETUNE_HANG_AFTER", "0.5")
    attempt = claim(run_dir)
    alive = attempt.folder / "alive"
    watching = watch(attempt)
    began = time.monotonic()
    while time.monotonic() - began < 1:
        alive.touch()
        os.utime(alive, (1000, 1000 + 60 * (time.monotonic() - began)))  # an hour's clock that stands in 1970
        assert watching._hung() is None
        time.sleep(0.01)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert watching.until_end().kind == "hang"


@pytest.mark.usefixtures("head")
def test_walltime_cancellation_and_sigterm_end_an_attempt(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = claim(make(tmp_path / "limited", walltime=1, grace=0))
    assert watch(limited).until_end().kind == "walltime"
    hasty = claim(make(tmp_path / "hasty", grace=0))
    ended = watch(hasty, stop=True).until_end()
    assert (ended.kind, ended.reason) == ("preemption", "the controller was told to end; no checkpoint within 0 s")
    monkeypatch.setenv("FLEETUNE_ALLOCATION_END", str(time.time() + 60))
    at_its_end = claim(make(tmp_path / "at its end", grace=0))
    ended = watch(at_its_end, stop=True).until_end()
    assert (ended.kind, ended.reason.partition(";")[0]) == (
        "walltime",
        "the walltime of the job that it is in is nearly over",
    )
    attempt = claim(run_dir)
    request_cancel(run_dir)
    assert watch(attempt).until_end().kind == "cancelled"


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize(
    ("told", "asked", "kind", "reason"),
    [
        (True, None, "preemption", "the controller was told to end; saved at step 7"),
        (False, "cancel", "cancelled", "saved at step 7"),
        (False, "pause", "paused", "paused at step 7"),
        (False, None, "success", ""),
    ],
)
def test_an_attempt_that_saves_in_time_has_ended_as_it_was_asked(
    run_dir: Path, told: bool, asked: str | None, kind: VerdictKind, reason: str
) -> None:
    attempt = claim(run_dir)
    if asked == "cancel":
        request_cancel(run_dir, save=True)
    driver = Sleeper(None)
    looking = Watch(attempt, driver, threading.Event())  # type: ignore[arg-type]
    if told:
        looking._told.set()

    def trainer() -> None:
        """Ends when it is asked to, as workers do."""
        if told or asked == "cancel":
            until(lambda: stop_requested(attempt))
        if told or asked:
            attempt.event("stopped", step=7)
        write_json(attempt.folder / "outcome.json", {"failures": {}})
        driver.exit_code = 0

    worker = threading.Thread(target=trainer)
    worker.start()
    found = looking.until_end()
    worker.join()
    assert (found.kind, found.reason) == (kind, reason)
    attempt.write_verdict(found.dump())
    assert (
        next_step(run_dir)
        == {
            "preemption": Again(1.0),
            "cancelled": Final("cancelled", "cancelled by request"),
            "paused": Final("cancelled", None, "fleetune resume goes on from there"),
            "success": Final("succeeded", None),
        }[kind]
    )


def asked_to_stop(run_dir: Path, opened_s_ago: float) -> tuple[str, float] | None:
    """Why an attempt is asked to save and end, and its seconds to do so, of a run that was opened so long ago."""
    attempt = claim(run_dir)
    claimed = attempt.folder / "claim.json"
    write_json(claimed, {**attempt.claim, "time": time.time() - opened_s_ago})
    assert watch(attempt)._must_end_now() is None
    stop = stop_requested(attempt)
    return stop and (stop.reason, stop.deadline - time.time())


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize(
    ("walltime", "grace", "opened_s_ago", "left_s"),
    [
        (1000, 100, 800, None),
        (1000, 100, 950, 50),  # to save is a part of the walltime
        (1000, 100, 1e6, 100),  # over before the attempt began, as after a long way to its end: not killed at once
        (1000, 900, 400, None),  # a grace of nearly all of the walltime leaves half of that to train
        (1000, 900, 600, 400),
    ],
)
def test_a_walltime_leaves_time_to_train_and_to_save(
    tmp_path: Path, walltime: int, grace: int, opened_s_ago: float, left_s: float | None
) -> None:
    asked = asked_to_stop(make(tmp_path / "limited", walltime=walltime, grace=grace), opened_s_ago)
    if left_s is None:
        assert asked is None
    else:
        assert asked == (f"resources.walltime of {walltime} s is over", pytest.approx(left_s, abs=20))


@pytest.mark.usefixtures("head")
def test_the_walltime_of_an_allocation_is_its_schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_REQUEUED", "1")
    assert asked_to_stop(make(tmp_path / "limited", walltime=1000), 1e6) is None


def test_a_pause_counts_for_the_attempts_that_come_to_it(run_dir: Path) -> None:
    assert pause_step(run_dir) is None
    claim(run_dir)
    request_pause(run_dir, 9)
    claim(run_dir)
    request_pause(run_dir, 5)
    assert pause_step(run_dir) == 5
    assert close(run_dir, {"state": "cancelled"}) and reopen(run_dir)
    assert pause_step(run_dir) is None


def test_a_head_that_nobody_answers_for_is_lost(run_dir: Path, head: socket.socket) -> None:
    attempt = claim(run_dir)
    head.close()
    verdict = watch(attempt).until_end()
    assert (verdict.kind, verdict.reason) == ("node_lost", "the Ray head is gone")


@pytest.mark.usefixtures("head")
def test_an_attempt_with_a_successor_gets_no_verdict(run_dir: Path) -> None:
    first = claim(run_dir)
    claim(run_dir)
    with pytest.raises(Fenced):
        watch(first, exit_code=0).until_end()


@pytest.mark.usefixtures("head")
def test_the_driver_is_believed(run_dir: Path) -> None:
    attempt = claim(run_dir)
    assert watch(attempt, exit_code=1).until_end().kind == "node_lost"  # it left no word
    boom = Failure("ValueError: boom", ("builtins.ValueError",))
    write_json(attempt.folder / "outcome.json", {"failures": {"1": boom.dump()}})
    assert watch(attempt, exit_code=0).until_end().reason == "rank 1: ValueError: boom"
    write_json(attempt.folder / "outcome.json", {"failures": {}})
    assert watch(attempt, exit_code=0).until_end().kind == "success"


def test_what_is_nobodys_has_no_rank() -> None:
    def fails() -> None:
        raise ConnectionError("refused")

    types = ("builtins.ConnectionError", "builtins.OSError")
    assert failures_of(fails) == {-1: Failure("ConnectionError: refused", types)}
    assert failures_of(lambda: None) == {}


def test_history_counts_steps_by_checkpoints(run_dir: Path) -> None:
    first = claim(run_dir)
    assert attempt_endings(run_dir) == [("node_lost", 0)]
    save(first, 10)
    first.write_verdict({"kind": "network"})
    assert attempt_endings(run_dir) == [("network", 10)]
    claim(run_dir, Start(1, 10))
    assert attempt_endings(run_dir) == [("network", 10), ("node_lost", 0)]
    claim(run_dir, Start(1, 5))  # the checkpoint of step 10 turned out to be damaged
    assert attempt_endings(run_dir) == [("network", 10), ("node_lost", -5), ("node_lost", 0)]


def test_history_begins_anew_when_a_run_is_reopened(run_dir: Path) -> None:
    claim(run_dir).write_verdict({"kind": "user_error", "reason": "boom", "evidence": "boom"})
    assert close(run_dir, result_of(run_dir, Final("failed", None)))
    assert result(run_dir) == {**(result(run_dir) or {}), "state": "failed", "reason": "boom", "attempt": 1}
    assert reopen(run_dir)
    assert attempt_endings(run_dir) == []
    claim(run_dir)
    assert attempt_endings(run_dir) == [("node_lost", 0)]


def test_a_run_that_is_cancelled_before_its_first_attempt_is_closed_without_one(run_dir: Path) -> None:
    assert not cancelled_within(run_dir, 0.0)
    request_cancel(run_dir)
    assert main(run_dir) == 0
    assert (result(run_dir) or {})["state"] == "cancelled"
    assert main(run_dir) == 0


def test_a_run_that_its_cluster_does_not_take_says_why(run_dir: Path) -> None:
    request_cancel(run_dir, why="SLURM does not take this job: Invalid qos specification")
    assert main(run_dir) == 0
    assert (result(run_dir) or {})["reason"] == "SLURM does not take this job: Invalid qos specification"


def test_a_controller_without_ray_claims_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert main(run_dir) == 1
    assert last_slot(run_dir) == 0


def test_a_run_that_never_gets_further_is_given_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.controller.deliver_rest", lambda _: 0)
    for _ in range(5):
        claim(run_dir)
    assert main(run_dir) == 0
    found = result(run_dir) or {}
    assert (found["state"], found["attempt"]) == ("failed", 5)
    assert found["reason"] == "5 attempts in a row without progress, the last one ended by node_lost"
    assert (found["verdict"], found["evidence"]) == ("node_lost", "attempts/5 has no verdict")


@pytest.mark.usefixtures("head")
def test_work_that_shows_it_is_alive_is_no_hang_until_it_stops(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETUNE_HANG_AFTER", "1")
    attempt = claim(run_dir)
    began = time.monotonic()

    def evaluate() -> None:
        while time.monotonic() - began < 2.5:
            attempt.note_progress()
            time.sleep(0.1)

    threading.Thread(target=evaluate).start()
    assert watch(attempt).until_end().kind == "hang"
    assert time.monotonic() - began >= 3.5


@pytest.mark.usefixtures("head")
def test_success_says_what_is_missing(run_dir: Path) -> None:
    attempt = claim(run_dir)
    write_json(attempt.folder / "outcome.json", {"failures": {}})
    attempt.event("missing", what="the merged model", why="no space left")
    verdict = watch(attempt, exit_code=0).until_end()
    attempt.write_verdict(verdict.dump())
    assert result_of(run_dir, Final("succeeded", None))["reason"] == "the merged model is missing: no space left"


def test_a_run_that_delivered_its_output_has_not_failed(run_dir: Path) -> None:
    attempt = claim(run_dir)
    attempt.write_verdict({"kind": "out_of_memory", "reason": "rank 0: out of memory", "evidence": "killed"})
    assert next_step(run_dir) == Final("failed", None)
    (attempt.folder / "output").mkdir()
    decision = next_step(run_dir)
    assert isinstance(decision, Final) and decision.state == "succeeded"
    assert close(run_dir, result_of(run_dir, decision))
    reason = (result(run_dir) or {})["reason"]
    assert "before it was checked" in reason and "rank 0: out of memory" in reason
    assert (run_dir / "output").exists()


def test_reopening_a_cancelled_run_takes_its_output_back(run_dir: Path) -> None:
    first = claim(run_dir)
    (first.folder / "output").mkdir()
    assert close(run_dir, {"state": "cancelled"})
    assert (run_dir / "output").exists()
    assert reopen(run_dir)
    assert not (run_dir / "output").exists() and not (run_dir / "result.json").exists()
    assert (run_dir / "attempts" / "2" / "output").exists()  # of the closing slot, where no late closer looks for it
