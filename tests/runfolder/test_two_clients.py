"""What one client of a shared folder decides, another acts on that has looked before and keeps what it was told."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import two_clients

from runfolder import chain
from runfolder.appended import read_lines, sealed_size
from runfolder.files import read_json
from runfolder.requests import cancel_requested, request_cancel
from runfolder.site import LocalSite


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of a run as two clients see it."""
    (tmp_path / "real" / "run").mkdir(parents=True)
    with two_clients(tmp_path / "real", tmp_path) as (a, b):
        yield a / "run", b / "run"


def look(run_dir: Path) -> None:
    """Have a client keep what it is told of a run."""
    for slot in chain.slots(run_dir):
        slot.appended()


def claim(run_dir: Path) -> chain.Attempt:
    made = chain.claim_next(run_dir, None)
    assert made
    return made


ROWS = [{"step": 1, "time": 1.0}, {"step": 2, "time": 2.0}]


def test_a_first_attempt_is_followed_by_a_second(clients: tuple[Path, Path]) -> None:
    a, b = clients
    look(b)
    claim(a)
    assert claim(b).number == 2


def test_what_was_appended_since_is_sealed(clients: tuple[Path, Path]) -> None:
    a, b = clients
    first = claim(a)
    look(b)
    first.append("metrics.jsonl", ROWS[0])
    (first.folder / "logs").mkdir()
    (first.folder / "logs" / "rank-0.log").write_text("one\n")
    claim(b)
    first.append("metrics.jsonl", ROWS[1])
    sealed = chain.Attempt(b, 1)
    assert read_lines(sealed, "metrics.jsonl") == [ROWS[0]]
    assert sealed_size(sealed, "logs/rank-0.log") == 4


def test_what_was_seen_empty_is_sealed_with_what_came_since(clients: tuple[Path, Path]) -> None:
    a, b = clients
    first = claim(a)
    (first.folder / "metrics.jsonl").touch()
    assert read_lines(chain.Attempt(b, 1), "metrics.jsonl") == []
    first.append("metrics.jsonl", ROWS[0])
    claim(b)
    assert read_lines(chain.Attempt(b, 1), "metrics.jsonl") == [ROWS[0]]


def test_what_a_slot_did_not_live_to_seal_is_sealed_by_the_next(clients: tuple[Path, Path]) -> None:
    a, b = clients
    first = claim(a)
    first.append("metrics.jsonl", ROWS[0])
    second = claim(a)
    (second.folder / "seals.json").unlink()
    claim(b)
    first.append("metrics.jsonl", ROWS[1])
    fourth = claim(a)
    assert read_json(fourth.folder / "seals.json")["1"] == {"metrics.jsonl": len(json.dumps(ROWS[0])) + 1}
    assert read_lines(chain.Attempt(b, 1), "metrics.jsonl") == [ROWS[0]]


def test_a_run_that_was_closed_is_reopened_and_claimed(clients: tuple[Path, Path]) -> None:
    a, b = clients
    first = claim(a)
    look(b)
    assert first.close({"state": "failed"})
    assert chain.reopen(b)
    assert chain.settle(a) is None and claim(a).number == 4
    assert chain.close(b, {"state": "cancelled"})
    assert chain.settle(a) == {"state": "cancelled"}


def test_the_end_is_asked_for_of_a_run_that_was_reopened(clients: tuple[Path, Path]) -> None:
    a, b = clients
    assert claim(a).close({"state": "cancelled"})
    look(b)
    assert chain.reopen(a)
    request_cancel(b)
    assert cancel_requested(a)
    assert chain.close(a, {"state": "cancelled"})
    look(b)
    assert chain.reopen(a) and not cancel_requested(a)
    assert LocalSite(b.parent).ask("run", "cancel") is None
    assert cancel_requested(b)
