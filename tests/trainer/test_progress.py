"""A phase without output is alive as long as it moves bytes, and no longer."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runfolder.appended import read_lines
from runfolder.chain import Attempt, claim_next
from trainer import progress
from trainer.world import World


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    monkeypatch.setattr(progress, "PERIOD_S", 0.05)
    (tmp_path / "run").mkdir()
    made = claim_next(tmp_path / "run", None)
    assert made
    with progress.noting_progress(made):
        yield made


def signs(attempt: Attempt, tmp_path: Path, size: int) -> int:
    """How often a second of reading and writing so many bytes at a time shows that an attempt is alive."""
    seen = set()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        (tmp_path / "download").write_bytes(b"x" * size)
        seen.add((attempt.folder / "alive").stat().st_mtime_ns)
        time.sleep(0.01)
    return len(seen)


def test_bytes_that_move_are_a_sign_of_life(attempt: Attempt, tmp_path: Path) -> None:
    assert signs(attempt, tmp_path, 1 << 20) > 3


def test_silence_is_none(attempt: Attempt, tmp_path: Path) -> None:
    assert signs(attempt, tmp_path, 16) == 1


def test_an_evaluation_says_now_and_then_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100, 4))  # seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    attempt = claim_next(tmp_path, None)
    assert attempt
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"))
        items = progress.counted(attempt, world, 20, "rows", [7] * 6, lambda size: size)
        assert list(items) == [7] * 6
    told = read_lines(attempt, "events.jsonl")
    assert [(event["done"], event["total"]) for event in told] == [(0, 42), (21, 42)]  # rank 0 tells, every 10 s
    assert len({event["began"] for event in told}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"evaluating after step 20: {done} of 42 rows" for done in (0, 21)]
