"""Four processes on two clients of one folder claim, close, reopen, cancel, seal and deliver as chance has it."""

import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mounts import two_clients

from runfolder import chain
from runfolder.appended import read_lines, sealed_size
from runfolder.files import read_json
from runfolder.requests import cancel_requested

HERE = Path(__file__).parent
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.parametrize("clients", ["one", "two"])
@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.chaos)])
def test_whatever_comes_first_there_is_one_truth(clients: str, times: int, tmp_path: Path) -> None:
    real, sink = tmp_path / "real", tmp_path / "sink"
    real.mkdir()
    sink.mkdir()
    with ExitStack() as stack:
        places = (real, real) if clients == "one" else stack.enter_context(two_clients(real, tmp_path))
        actors = [actor(places[number % 2], sink, SEED * 4 + number) for number in range(4)]
        for process in actors:
            stack.callback(process.kill)
        for number in range(times):
            name = f"run-{number}"
            (real / name).mkdir()
            for process in actors:
                assert process.stdin
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
            check(real / name, sink / name, [done for process in actors for done in answer(process)])


def actor(place: Path, sink: Path, seed: int) -> "subprocess.Popen[str]":
    """A process that acts on runs below a place."""
    command = [sys.executable, "-P", HERE / "interleaved.py", place, sink, str(seed)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Done(NamedTuple):
    """One operation of an actor: what came of it, and when it began and ended (seconds since 1970)."""

    operation: str
    came: Any
    began: float
    ended: float


def answer(process: "subprocess.Popen[str]") -> list[Done]:
    """What an actor did."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, "an actor has died"
    return [Done(*done) for done in json.loads(line)]


def check(run_dir: Path, sink: Path, done: list[Done]) -> None:
    """One result, no lost row, no stranded run."""
    slots = chain.slots(run_dir)
    assert [slot.number for slot in slots] == list(range(1, len(slots) + 1)), done
    # A reopening follows a closing slot, and nothing else does.
    kinds = [slot.claim["kind"] for slot in slots]
    assert all((first == "close") == (then == "reopen") for first, then in pairwise(kinds)), done
    claimed = {one.came for one in done if one.operation == "claim" and one.came}
    assert {slot.number for slot in chain.attempts(run_dir)} == claimed, done
    assert not list((run_dir / "attempts").glob(".claim-*")), done
    check_rows(run_dir, sink, done)
    check_cancelled(run_dir, done)

    ended = chain.settle(run_dir)
    assert (ended is not None) == (kinds[-1:] == ["close"]), done
    if ended is None:
        assert not (run_dir / "result.json").exists(), done
        assert chain.claim_next(run_dir, None), "nobody can go on with it"
    else:
        assert read_json(run_dir / "result.json") == ended == slots[-1].claim["result"], done
        made = chain.Attempt(run_dir, slots[-1].claim["closes"]).folder / "output"
        # A ghost may make one after its own was delivered.
        assert not made.exists() or (run_dir / "output").exists(), done


def check_rows(run_dir: Path, sink: Path, done: list[Done]) -> None:
    """What was reported before a successor came counts, and nothing else was delivered."""
    counted: set[tuple[int, int]] = set()
    for attempt in chain.attempts(run_dir):
        is_last = attempt.number == chain.last_slot(run_dir)
        assert is_last or sealed_size(attempt, "metrics.jsonl") is not None, (attempt.number, done)
        counted |= {(attempt.number, row["step"]) for row in read_lines(attempt, "metrics.jsonl")}
    for report in done:
        if report.operation == "report":
            number, step = report.came
            successor = chain.Attempt(run_dir, number + 1)
            before = not successor.folder.exists() or report.ended < successor.claim["time"]
            assert not before or (number, step) in counted, (number, step, done)
    assert sent(sink) <= counted, (sent(sink) - counted, done)


def check_cancelled(run_dir: Path, done: list[Done]) -> None:
    """Whoever asked for the end after the run was last reopened is heard."""
    reopened = max((one.ended for one in done if one.operation == "reopen" and one.came), default=0.0)
    asked = any(one.operation == "cancel" and one.began > reopened for one in done)
    assert not asked or cancel_requested(run_dir), done


def sent(sink: Path) -> set[tuple[int, int]]:
    """The rows that were delivered, as (attempt, step)."""
    lines = sink.read_text().splitlines() if sink.exists() else []
    return {(int(number), int(step)) for number, step in map(str.split, lines)}


def test_a_claim_whose_answer_is_lost_is_still_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, rng = Path.rename, random.Random(SEED)

    def lossy(self: Path, target: Path) -> Path:
        """A rename that is done, and then asked for again, as by a client of NFS that heard no answer."""
        done = rename(self, target)
        if self.name.startswith(".claim-") and rng.random() < 0.7:
            rename(self, target)
        return done

    monkeypatch.setattr(Path, "rename", lossy)
    for number in range(1, 8):
        attempt = chain.claim_next(tmp_path, None)
        assert attempt and attempt.number == number
        assert (attempt.folder / "seals.json").exists()
    assert chain.close(tmp_path, {"state": "failed"}) and chain.reopen(tmp_path)
