"""A phase without output is alive as long as it moves bytes, and no longer."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runfolder.chain import Attempt, claim_next
from trainer import progress


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
