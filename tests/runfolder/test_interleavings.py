"""Four processes on two clients of one folder claim, close, reopen, cancel, seal and deliver as chance has it."""

import ctypes.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from runfolder import chain
from runfolder.appended import sealed_size
from runfolder.files import read_json

HERE = Path(__file__).parent
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@contextmanager
def mounted(folder: Path, at: Path) -> Iterator[Path]:
    """A folder as one client sees it that keeps what it was told (see caching_mount.py)."""
    at.mkdir()
    server = subprocess.Popen([sys.executable, HERE / "caching_mount.py", folder, at])
    try:
        deadline = time.monotonic() + 60
        while not at.is_mount():
            assert server.poll() is None and time.monotonic() < deadline, "no mount"
            time.sleep(0.05)
        yield at
    finally:
        server.terminate()
        server.wait()
        subprocess.run(["umount", "-l", at], capture_output=True)


def can_mount() -> bool:
    """Whether this process may mount, and has what it takes."""
    library = ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")
    return library is not None and os.geteuid() == 0 and Path("/dev/fuse").exists()


@pytest.mark.parametrize("clients", ["one", "two"])
@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.chaos)])
def test_whatever_comes_first_there_is_one_truth(clients: str, times: int, tmp_path: Path) -> None:
    if clients == "two" and not can_mount():
        pytest.skip("needs root, /dev/fuse and libfuse")
    real, sink = tmp_path / "real", tmp_path / "sink"
    real.mkdir()
    sink.mkdir()
    with ExitStack() as stack:
        places = [real]
        if clients == "two":
            places = [stack.enter_context(mounted(real, tmp_path / name)) for name in ("a", "b")]
        actors = [actor(places[number % len(places)], sink, SEED * 4 + number) for number in range(4)]
        for process in actors:
            stack.callback(process.kill)
        for number in range(times):
            name = f"run-{number}"
            (real / name).mkdir()
            for process in actors:
                assert process.stdin
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
            check(real / name, sink / name, [answer(process) for process in actors])


def actor(place: Path, sink: Path, seed: int) -> "subprocess.Popen[str]":
    """A process that acts on runs below a place."""
    command = [sys.executable, "-P", HERE / "interleaved.py", place, sink, str(seed)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> list[tuple[str, object]]:
    """What an actor did."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, "an actor has died"
    return [(operation, came) for operation, came in json.loads(line)]


def check(run_dir: Path, sink: Path, done: list[list[tuple[str, object]]]) -> None:
    """One result, no lost row, no stranded run."""
    slots = chain.slots(run_dir)
    assert [slot.number for slot in slots] == list(range(1, len(slots) + 1)), done
    # A reopening follows a closing slot, and nothing else does.
    kinds = [slot.claim["kind"] for slot in slots]
    assert all((first == "close") == (then == "reopen") for first, then in pairwise(kinds)), done
    claimed = [came for actions in done for operation, came in actions if operation == "claim" and came]
    assert {slot.number for slot in chain.attempts(run_dir)} == set(claimed), done
    assert not list((run_dir / "attempts").glob(".claim-*")), done

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
    for number, step in sent(sink):
        attempt = chain.Attempt(run_dir, number)
        whole = (attempt.folder / "metrics.jsonl").read_bytes()[: sealed_size(attempt, "metrics.jsonl")]
        assert step in [json.loads(line)["step"] for line in whole.splitlines()], (number, step, done)


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
