"""The chain of attempts: one claim per slot, fencing, closing, sealing, reopening."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runfolder import chain
from runfolder.appended import read_lines
from runfolder.chain import Attempt, Fenced, Start
from runfolder.files import read_json
from runfolder.requests import cancel_requested, request_cancel


def claim(run_dir: Path, start: Start | None = None) -> Attempt:
    made = chain.claim_next(run_dir, start)
    assert made is not None
    return made


def test_a_slot_is_taken_once_however_many_try(tmp_path: Path) -> None:
    won: list[Attempt] = []
    barrier = threading.Barrier(8)

    def attempt() -> None:
        barrier.wait()
        if made := chain._take_slot(tmp_path, 1, {"kind": "attempt", "start": None}):
            won.append(made)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [attempt.number for attempt in won] == [1]
    assert sorted(p.name for p in (tmp_path / "attempts").iterdir()) == ["1"]


def test_a_paused_attempt_cannot_close_a_run_that_went_on(tmp_path: Path) -> None:
    ghost, live = claim(tmp_path), claim(tmp_path, Start(1, 5))
    with pytest.raises(Fenced):
        ghost.check()
    assert not ghost.close({"state": "succeeded", "by": "ghost"})
    assert chain.result(tmp_path) is None
    assert live.close({"state": "succeeded", "by": "live"})
    assert json.loads((tmp_path / "result.json").read_text())["by"] == "live"
    assert not ghost.close({"state": "failed"})
    assert chain.claim_next(tmp_path, None) is None


def test_what_a_ghost_appends_is_not_read(tmp_path: Path) -> None:
    ghost = claim(tmp_path)
    ghost.append("metrics.jsonl", {"step": 1, "time": 1.0})
    claim(tmp_path)
    ghost.append("metrics.jsonl", {"step": 2, "time": 2.0})
    assert read_lines(ghost, "metrics.jsonl") == [{"step": 1, "time": 1.0}]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    attempt.append("metrics.jsonl", {"step": 1, "time": 1.0})
    with (attempt.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert read_lines(attempt, "metrics.jsonl") == [{"step": 1, "time": 1.0}]


def test_work_counts_up_to_the_start_of_the_successor(tmp_path: Path) -> None:
    claim(tmp_path)
    claim(tmp_path, Start(1, 40))
    claim(tmp_path, Start(1, 30))
    assert [(a.number, bound) for a, bound in chain.step_bounds(tmp_path)] == [(3, float("inf")), (2, 30), (1, 30)]


def test_closing_moves_the_output_once(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    (attempt.folder / "output").mkdir()
    (attempt.folder / "output" / "weights").write_text("w")
    assert attempt.close({"state": "succeeded"})
    assert (tmp_path / "output" / "weights").read_text() == "w"
    assert chain.settle(tmp_path) == {"state": "succeeded"}


def test_a_close_that_was_cut_off_is_settled_by_the_next_reader(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    (attempt.folder / "output").mkdir()
    chain._take_slot(tmp_path, 2, {"kind": "close", "closes": 1, "result": {"state": "succeeded"}})
    assert not (tmp_path / "result.json").exists()
    assert chain.settle(tmp_path) == {"state": "succeeded"}
    assert (tmp_path / "output").is_dir() and (tmp_path / "result.json").exists()


def test_a_cancelled_run_can_be_reopened_and_a_succeeded_one_cannot(tmp_path: Path) -> None:
    claim(tmp_path)
    request_cancel(tmp_path)
    assert cancel_requested(tmp_path)
    assert chain.close(tmp_path, {"state": "cancelled"})
    assert chain.reopen(tmp_path)
    assert not cancel_requested(tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert claim(tmp_path).close({"state": "succeeded"})
    assert not chain.reopen(tmp_path)


def paused_at_the_result(run_dir: Path, act: Callable[[], object]) -> int:
    """Have a process do something, which is paused as it is about to write or remove result.json; gives its id."""
    pid = os.fork()
    if pid == 0:
        pauses = [signal.SIGSTOP]
        for name in ("replace", "unlink"):
            change = getattr(Path, name)
            setattr(Path, name, pausing(change, run_dir / "result.json", pauses))
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def pausing(change: Callable[..., object], target: Path, pauses: list[int]) -> Callable[..., object]:
    """A change of files that pauses its process first, as often as there are pauses, where it is the target's."""

    def paused(*paths: Path, **options: object) -> object:
        if target in paths and pauses:
            os.kill(os.getpid(), pauses.pop())
        return change(*paths, **options)

    return paused


def wake(pid: int) -> None:
    """Let a paused process go on to its end."""
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)


def test_a_closer_that_was_paused_does_not_bring_its_result_back(tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    first = paused_at_the_result(tmp_path, lambda: attempt.close({"state": "failed"}))
    second = paused_at_the_result(tmp_path, lambda: chain.settle(tmp_path))
    assert chain.reopen(tmp_path)
    wake(first)
    assert not (tmp_path / "result.json").exists()  # the run goes on
    assert claim(tmp_path).close({"state": "succeeded"})
    wake(second)
    assert read_json(tmp_path / "result.json") == {"state": "succeeded"}


def test_who_was_paused_as_a_run_went_on_does_not_take_its_result_away(tmp_path: Path) -> None:
    assert claim(tmp_path).close({"state": "failed"}) and chain.reopen(tmp_path)
    (tmp_path / "result.json").write_text("{}")  # of a closer that died behind its last look
    late = paused_at_the_result(tmp_path, lambda: chain.settle(tmp_path))
    assert claim(tmp_path).close({"state": "succeeded"})
    wake(late)
    assert read_json(tmp_path / "result.json") == {"state": "succeeded"}
