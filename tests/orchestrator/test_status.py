"""Where runs stand, and their logs, on folders as trainer and controller leave them."""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import make_job
from run_folders import claim, eval_row, make_run, plan, step_row, steps

import fleetune
from clusters.base import ClusterStatus as View
from clusters.base import Standing
from clusters.local import Local
from fleetune import InputError
from orchestrator import progress, runs, status
from orchestrator.logs import LogReader
from runfolder.chain import Attempt, claim_next, close
from runfolder.delivered import note_delivered
from runfolder.hindrance import note_hindrance
from runfolder.latest_start import note_latest_start
from runfolder.requests import cancel_requested, cancel_saves, request_cancel
from runfolder.site import LocalSite
from runfolder.snapshot import snapshot


@pytest.fixture
def run(home: Path) -> Path:
    """The folder of a run that the cluster has not got."""
    return make_run(home / "runs", runs.new_id("fake"), None)


def log(attempt: Attempt, rank: int, text: str) -> None:
    path = attempt.folder / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        stream.write(text)


def test_a_submitted_run_waits_with_a_reason(home: Path, tmp_path: Path) -> None:
    run_id = fleetune.submit(make_job(tmp_path)).run_id
    found = fleetune.status(run_id)
    assert (found.run_id, found.name, found.cluster, found.state) == (run_id, "sums", "local", "queued")
    assert found.reason == "needs 2 cpus, Ray is starting"
    assert (found.step, found.steps, found.attempt, found.verdict, found.output_dir) == (0, 7, 0, None, None)
    assert found.run_dir == str(home / "runs" / run_id)


def test_a_run_that_its_cluster_does_not_know_is_unknown(run: Path) -> None:
    found = fleetune.status(run.name)
    assert (found.state, found.steps) == ("unknown", 100)


def test_what_keeps_a_run_from_its_first_attempt_is_in_its_status(run: Path) -> None:
    note_hindrance(run, 1, "ImportError: no torch")
    running = Standing(snapshot(run), View("running", "RayJob a-s1"))
    assert status.join_status(running).reason == "RayJob a-s1; ImportError: no torch"
    over = Standing(snapshot(run), View("ended"))
    assert (status.join_status(over).state, status.join_status(over).reason) == ("unknown", "ImportError: no torch")
    claim(run)
    assert "ImportError" not in str(status.join_status(Standing(snapshot(run), View("running"))).reason)


def test_steps_and_verdicts_are_joined_over_attempts(run: Path) -> None:
    first = claim(run)
    plan(first)
    steps(first, 1, 9)
    assert fleetune.status(run.name).step == 9
    first.write_verdict({"kind": "node_lost", "reason": "rank 1: killed"})
    second = claim(run, start=6)
    assert (fleetune.status(run.name).step, fleetune.status(run.name).attempt) == (6, 2)
    step_row(second, 7)
    with (second.folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 8, "lo')
    assert fleetune.status(run.name).step == 7


def test_the_plan_of_the_trainer_counts_more_than_the_job(run: Path) -> None:
    attempt = claim(run)
    attempt.event("plan", steps=41, parameters=1, trained=1)
    assert fleetune.status(run.name).steps == 41


def test_one_run_is_looked_at_in_full(run: Path) -> None:
    attempt = claim(run)
    plan(attempt)
    steps(attempt, 1, 9)
    eval_row(attempt, 9, eval_loss=0.5)
    output = run / "output"
    output.mkdir()
    (output / "adapter_config.json").touch()
    found = fleetune.status(run.name)
    assert found.figures and found.figures.last_evaluation == {"step": 9, "eval_loss": 0.5}
    assert found.loading[1] == f"model = PeftModel.from_pretrained(model, '{output}')"
    assert found.remaining_s is None  # its cluster does not say that it runs
    full = snapshot(run, in_full=True)
    assert status.join_status(Standing(full, View("running"))).remaining_s == 91.0
    assert status.join_status(Standing(snapshot(run), View("running"))).remaining_s is None
    assert [(view.figures, view.loading) for view in fleetune.list_runs()] == [(None, ())]


def test_the_result_is_the_last_word(run: Path) -> None:
    attempt = claim(run)
    attempt.write_verdict({"kind": "user_error", "reason": "rank 0: ValueError"})
    (run / "mlflow.json").write_text(json.dumps({"mlflow_run_id": "abc", "uri": "sqlite:///x"}))
    close(run, {"state": "failed", "reason": "rank 0: ValueError"})
    found = fleetune.status(run.name)
    assert (found.state, found.reason, found.verdict) == ("failed", "rank 0: ValueError", "user_error")
    assert found.mlflow_run_id == "abc"


def test_what_a_run_does_is_said_while_it_does_something(run: Path) -> None:
    def doing(view: View) -> str | None:
        activity = status.join_status(Standing(snapshot(run), view)).activity
        return activity.doing if activity else None

    attempt = claim(run)
    attempt.event("loading_base")
    assert doing(View("running")) == "loading the base"
    assert doing(View("queued")) is None and doing(View("unknown", "no answer")) is None
    attempt.write_verdict({"kind": "success", "reason": ""})
    close(run, {"state": "succeeded", "reason": None})
    assert doing(View("ended")) == "delivering to MLflow"
    closed = snapshot(run)
    later = replace(closed, looked_at=closed.looked_at + 86_400)
    late = status.join_status(Standing(later, View("ended"))).activity
    assert late and late.doing.endswith("nobody delivers it: fleetune compare does")
    note_delivered(run, "a" * 32)
    assert doing(View("ended")) is None


def test_a_run_whose_controller_was_killed_does_not_run(run: Path) -> None:
    """Nobody wrote a verdict, and whoever goes on with the run has not claimed its attempt yet."""
    running = View("running")
    assert not snapshot(run).left
    first = claim(run)
    plan(first)
    steps(first, 1, 30)
    full = status.join_status(Standing(snapshot(run, in_full=True), running))
    assert full.state == "running" and full.activity and full.remaining_s is not None
    assert note_latest_start(run) == 1
    left = status.join_status(Standing(snapshot(run, in_full=True), running))
    assert (left.state, left.activity, left.remaining_s, left.step) == ("preempted", None, None, 30)
    assert left.reason == "attempt 1 ended without a verdict, and the next one begins"
    assert left.figures and left.figures.goodput.stalled > 0
    second = claim(run, start=6)
    assert status.join_status(Standing(snapshot(run), running)).state == "starting"
    steps(second, 7, 8)
    assert status.join_status(Standing(snapshot(run), running)).state == "running"


def test_a_start_that_is_noted_before_the_first_attempt_leaves_none(run: Path) -> None:
    note_latest_start(run)
    assert not snapshot(run).left
    assert status.join_status(Standing(snapshot(run), View("running"))).state == "starting"


def test_a_silent_run_says_no_remaining_time_and_has_stalled(run: Path) -> None:
    attempt = claim(run)
    steps(attempt, 1, 30)  # long ago
    begun = time.time() - 3600
    attempt.append("events.jsonl", {"event": "plan", "time": begun, "steps": 100})
    silent = status.join_status(Standing(snapshot(run, in_full=True), View("running")))
    assert silent.state == "running" and silent.remaining_s is None
    assert silent.figures and silent.figures.goodput.stalled == pytest.approx(3600, abs=60)
    attempt.note_progress()
    awake = status.join_status(Standing(snapshot(run, in_full=True), View("running")))
    assert awake.remaining_s is not None
    assert awake.figures and awake.figures.goodput.stalled == 0


def test_a_run_that_is_about_to_succeed_is_not_preempted(run: Path) -> None:
    attempt = claim(run)
    steps(attempt, 1, 9)
    for verdict, state in (("success", "running"), ("node_lost", "preempted")):
        attempt.write_verdict({"kind": verdict, "reason": "gone"})
        assert status.join_status(Standing(snapshot(run), View("running"))).state == state


CLOSER = """
import os, signal, sys, time
from pathlib import Path
from runfolder.chain import close

def rename(self, target, real=Path.rename):
    if target.name == "output":
        print("moving", flush=True)
        time.sleep(1) if sys.argv[2] == "late" else os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)

Path.rename = rename
close(Path(sys.argv[1]), {"state": "succeeded", "reason": None})
"""


@pytest.mark.parametrize(("closer", "code"), [("late", 0), ("killed", -9)])
def test_a_run_has_succeeded_with_its_output_in_place(run: Path, closer: str, code: int) -> None:
    made = claim(run).folder / "output"
    made.mkdir()
    (made / "weights").write_text("w")
    command = [sys.executable, "-P", "-c", CLOSER, str(run), closer]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"moving\n"
        ended = fleetune.wait(run.name)
        assert (ended.state, ended.output_dir) == ("succeeded", str(run / "output"))
        assert (run / "output" / "weights").read_text() == "w"
    assert process.returncode == code
    assert json.loads((run / "result.json").read_text())["state"] == "succeeded"


def test_runs_are_found_by_id_name_and_prefix(home: Path) -> None:
    names = ("gsm-0000000001", "gsm-0000000002", "gsm-dora-0000000003")
    old, new, other = (make_run(home / "runs", run_id, None) for run_id in names)
    assert runs.find("gsm-0000000001").run_id == old.name
    assert runs.find("gsm").run_id == new.name
    assert runs.find("gsm-d").run_id == other.name
    with pytest.raises(InputError, match="found 2 runs, like gsm-0000000001, gsm-0000000002"):
        runs.find("gsm-0")
    with pytest.raises(InputError, match="no such run; the latest are gsm-0000000001"):
        runs.find("nothing")
    assert [status.run_id for status in fleetune.list_runs()] == [other.name, new.name, old.name]


def test_many_runs_are_looked_at_in_one_trip(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleetune.submit(make_job(tmp_path))
    for number in range(20):
        run_dir = make_run(home / "runs", f"many-{number:010}", None)
        for _ in range(3):
            attempt = claim(run_dir)
        plan(attempt)
        steps(attempt, 1, 100)
        if number % 2:
            close(run_dir, {"state": "succeeded", "reason": None})
    trips = []
    snapshots = LocalSite.snapshots
    monkeypatch.setattr(
        LocalSite,
        "snapshots",
        lambda site, ids, in_full: trips.append((list(ids), in_full)) or snapshots(site, *trips[-1]),
    )
    found = fleetune.list_runs()
    assert len(found) == 21 and [in_full for _, in_full in trips] == [False]
    assert [status.state for status in found if status.name == "many"].count("succeeded") == 10
    assert {(status.step, status.attempt) for status in found if status.name == "many"} == {(100, 3)}


def test_logs_are_joined_and_what_a_paused_attempt_adds_is_not_shown(run: Path) -> None:
    first = claim(run)
    log(first, 0, "one\ntwo\n")
    log(first, 1, "other\n")
    second = claim(run, start=0)
    log(first, 0, "woken\n")
    log(second, 0, "three\nfour")
    assert fleetune.logs(run.name) == (
        "=== attempt 1, rank 0 ===\none\ntwo\n=== attempt 2, rank 0 ===\nthree\nfour\n"
    )
    assert fleetune.logs(run.name, rank=1) == "=== attempt 1, rank 1 ===\nother\n"
    with pytest.raises(InputError, match="--rank: found 7; allowed: 0, 1"):
        fleetune.logs(run.name, rank=7)


def test_logs_of_all_ranks_are_merged_attempt_by_attempt(run: Path) -> None:
    first = claim(run)
    for rank in (10, 0, 2):
        log(first, rank, f"{rank}: one\n{rank}: two\n")
    log(first, 1, "")
    second = claim(run, start=0)
    log(first, 0, "woken\n")
    log(second, 1, "\nlast")
    merged = (
        "=== attempt 1 ===\n"
        "rank 0 | 0: one\nrank 0 | 0: two\n"
        "rank 2 | 2: one\nrank 2 | 2: two\n"
        "rank 10 | 10: one\nrank 10 | 10: two\n"
        "=== attempt 2 ===\n"
        "rank 1 | \nrank 1 | last\n"
    )
    assert fleetune.logs(run.name, rank=None) == merged
    reader = LogReader(runs.find(run.name), None)
    assert reader.read() == merged.removesuffix("rank 1 | last\n")
    log(second, 1, " words\n")
    log(second, 3, "new\n")
    assert reader.read() == "rank 1 | last words\nrank 3 | new\n"
    assert reader.read(final=True) == ""


def test_without_an_attempt_the_controllers_words_are_shown(run: Path) -> None:
    path = Local.here().log(run.name)
    path.parent.mkdir(parents=True)
    path.write_text("cannot begin\n")
    assert fleetune.logs(run.name) == "cannot begin\n"


def test_a_growing_log_is_read_by_whole_lines(run: Path) -> None:
    attempt = claim(run)
    reader = LogReader(runs.find(run.name))
    assert reader.read() == ""
    log(attempt, 0, "one\ntw")
    assert reader.read() == "=== attempt 1, rank 0 ===\none\n"
    log(attempt, 0, "o\n")
    assert reader.read() == "two\n"
    assert reader.read(final=True) == ""


def test_following_goes_across_attempts_to_the_end(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PAUSE_S", 0.01)

    def work() -> None:
        first = claim(run)
        log(first, 0, "one\n")
        time.sleep(0.1)
        second = claim(run, start=0)
        log(second, 0, "two\n")
        step_row(second, 1)
        time.sleep(0.1)
        close(run, {"state": "failed", "reason": "rank 0: boom"})

    worker = threading.Thread(target=work)
    worker.start()
    handle = runs.find(run.name)
    ended = progress.follow(handle, LogReader(handle))
    worker.join()
    assert (ended.state, ended.reason) == ("failed", "rank 0: boom")
    assert capsys.readouterr().out == "=== attempt 1, rank 0 ===\none\n=== attempt 2, rank 0 ===\ntwo\n"


def test_cancelling_asks_whoever_leads_the_run(home: Path, tmp_path: Path) -> None:
    run_id = fleetune.submit(make_job(tmp_path)).run_id
    assert fleetune.cancel("sums") == run_id
    assert list((home / "runs" / run_id / "requests").glob("cancel-*.json"))
    close(home / "runs" / run_id, {"state": "cancelled", "reason": "by request"})
    assert fleetune.cancel(run_id) == run_id


def test_what_succeeded_is_neither_cancelled_nor_resumed(run: Path) -> None:
    close(run, {"state": "succeeded", "reason": None})
    with pytest.raises(InputError, match="it has succeeded already"):
        fleetune.cancel(run.name)
    with pytest.raises(InputError, match="it has succeeded, there is nothing"):
        fleetune.resume(run.name)


def test_a_run_that_is_asked_to_end_says_so_and_is_not_resumed_before_it_has(run: Path) -> None:
    steps(claim(run), 1, 5)
    fleetune.pause(run.name, 50)
    assert snapshot(run).asked == "asked to pause after step 50"
    assert fleetune.status(run.name).reason is not None
    assert fleetune.resume(run.name) == run.name  # it goes on, and pauses later
    fleetune.pause(run.name)
    with pytest.raises(InputError, match="it was asked to end and has not yet; resume it when it has"):
        fleetune.resume(run.name)
    assert "asked to pause after step 6" in (fleetune.status(run.name).reason or "")
    fleetune.cancel(run.name)
    assert snapshot(run).asked == "asked to end"


def test_what_failed_is_queued_again(run: Path) -> None:
    claim(run)
    request_cancel(run)
    close(run, {"state": "failed", "reason": "boom"})
    for _ in range(2):
        assert fleetune.resume(run.name) == run.name
        assert [entry.run_id for entry in Local.here().queue.list()] == [run.name]
    found = fleetune.status(run.name)
    assert (found.state, found.attempt) == ("preempted", 1)
    assert claim_next(run, None)


def test_what_is_asked_of_a_run_whose_folder_was_removed_makes_nothing(home: Path, tmp_path: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("gone"), None)
    runs.remember(run_dir.name, "local")
    shutil.rmtree(run_dir)
    for ask in (fleetune.pause, fleetune.cancel, lambda run: fleetune.fetch(run, tmp_path / "to")):
        with pytest.raises(InputError, match="its folder is not there any more"):
            ask(run_dir.name)
    assert not run_dir.exists()


def test_who_wants_the_end_at_once_is_not_overruled_by_who_would_wait(home: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("fake"), None)
    request_cancel(run_dir)
    request_cancel(run_dir, save=True)
    assert cancel_requested(run_dir) and not cancel_saves(run_dir)
