"""Every verb, on runs whose folders only another process can see: it stands for another machine.

It has another HOME, another FLEETUNE_HOME and another current folder. The process half of the cluster is the local
one of that home: a queue that nobody serves.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from jobs import make_job, only_queued
from run_folders import claim, make_run, plan, step_row, steps

import fleetune
from clusters.base import Unreachable
from clusters.local import Local
from clusters.remote_site import RemoteSite
from fleetune import InputError
from orchestrator import backends, progress, runs
from orchestrator.logs import LogReader
from runfolder.appended import Position
from runfolder.chain import close, result
from runfolder.requests import cancel_requested
from runfolder.secrets import read_secrets


@dataclass(frozen=True)
class Elsewhere:
    """The local cluster of another home, whose run folders are reached through another process."""

    home: Path
    command: tuple[str, ...]

    @property
    def site(self) -> RemoteSite:
        """Where the run folders are."""
        return RemoteSite("elsewhere", self.command)

    def __getattr__(self, name: str) -> Any:
        """All about processes is the local cluster's."""
        return getattr(Local(self.home), name)


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def far_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The FLEETUNE_HOME of the other machine."""
    there = tmp_path / "there"
    there.mkdir()
    settings = [f"HOME={there / 'nobody'}", f"FLEETUNE_HOME={there / 'fleetune'}"]
    command = ("env", "-C", str(there), *settings, sys.executable, "-P", "-m", "runfolder", "-")
    monkeypatch.setitem(backends.CLUSTERS, "elsewhere", lambda: Elsewhere(there / "fleetune", command))
    with only_queued(there / "fleetune"):
        yield there / "fleetune"


def test_a_submitted_run_is_there_and_not_here(
    far_home: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = fleetune.submit(make_job(tmp_path), cluster="elsewhere")
    folder = far_home / "runs" / done.run_id
    assert (folder / "job.yaml").exists() and not (home / "runs").exists()
    assert read_secrets(folder) == {"HF_TOKEN": "hf_secret"}
    assert (folder / "secrets.json").stat().st_mode & 0o077 == 0
    (entry,) = Local(far_home).queue.list()
    dry = fleetune.dry_run(tmp_path / "job.yaml", cluster="elsewhere")
    assert entry.text == dry.replace(runs.RUN_ID.search(dry)[0], done.run_id)  # type: ignore[index]
    assert "hf_secret" not in entry.text
    found = fleetune.status(done.run_id)
    assert (found.cluster, found.state, found.run_dir) == ("elsewhere", "queued", str(folder))
    assert [run.run_id for run in fleetune.list_runs()] == [done.run_id]
    again = fleetune.submit(make_job(tmp_path), cluster="elsewhere", run_id=done.run_id)
    assert again.adopted
    with pytest.raises(InputError, match="is taken by another job"):
        fleetune.submit(make_job(tmp_path, method="rslora"), cluster="elsewhere", run_id=done.run_id)


def test_a_run_is_followed_cancelled_resumed_and_fetched(
    far_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PAUSE_S", 0.01)
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    run = runs.find(run_dir.name, "elsewhere")
    runs.remember(run_dir.name, "elsewhere")
    first = claim(run_dir)
    plan(first)
    steps(first, 1, 9)
    (first.folder / "logs").mkdir()
    (first.folder / "logs" / "rank-0.log").write_bytes(b"one\n\xff\xfe torn")
    assert (fleetune.status("fake").step, fleetune.status("fake").attempt) == (9, 1)
    assert fleetune.logs("fake").startswith("=== attempt 1, rank 0 ===\none\n")
    with pytest.raises(InputError, match="--rank: found 3; allowed: 0"):
        fleetune.logs("fake", rank=3)
    reader = LogReader(run)
    assert reader.read() == "=== attempt 1, rank 0 ===\none\n"

    fleetune.cancel("fake")
    assert cancel_requested(run_dir)
    worker = threading.Thread(target=lambda: close(run_dir, {"state": "cancelled", "reason": "by request"}))
    worker.start()
    assert fleetune.wait("fake").state == "cancelled"
    worker.join()
    with pytest.raises(InputError, match=r"data\.train|base"):  # its invented data are nowhere
        make_changed(run_dir)
        fleetune.resume("fake")
    assert run.site.fetch(run.run_id, tmp_path / "here").joinpath("job.yaml").exists()
    assert "cancelled" in (tmp_path / "here" / "result.json").read_text()
    capsys.readouterr()


def make_changed(run_dir: Path) -> None:
    """Give the run data that are not those of its submission."""
    record = (run_dir / "job.yaml").read_text()
    (run_dir / "job.yaml").write_text(record.replace("train: train.jsonl", f"train: {run_dir / 'gone.jsonl'}"))


def test_what_cannot_be_reached_is_unknown_and_nothing_else(far_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    runs.remember(run_dir.name, "elsewhere")
    down = replace(backends.CLUSTERS["elsewhere"](), command=("sh", "-c", "echo no route >&2; exit 255"))
    monkeypatch.setitem(backends.CLUSTERS, "elsewhere", lambda: down)
    found = fleetune.status(run_dir.name)
    assert (found.state, found.reason) == ("unknown", "cluster elsewhere: no route")
    with pytest.raises(Unreachable, match="no route"):
        fleetune.cancel(run_dir.name)
    assert result(run_dir) is None


def test_a_damaged_run_is_named_and_holds_nobody_up(far_home: Path) -> None:
    good, bad = (make_run(far_home / "runs", runs.new_id(name), None) for name in ("good", "bad"))
    (bad / "run.json").unlink()
    for run in (good, bad):
        runs.remember(run.name, "elsewhere")
    for text in ("", "[]", "{", "format: 2", "a: &a [*a]", "cluster: local"):
        (bad / "job.yaml").write_text(text)
        found = {status.run_id: status for status in fleetune.list_runs()}
        assert found[good.name].reason == "this cluster has not got the run"
        assert (found[bad.name].state, str(bad) in str(found[bad.name].reason)) == ("unknown", True), text


def test_a_file_is_read_from_where_it_was_left(far_home: Path) -> None:
    run_dir = make_run(far_home / "runs", runs.new_id("fake"), None)
    site = runs.find(run_dir.name, "elsewhere").site
    first = claim(run_dir)
    step_row(first, 1)
    (chunk,) = site.read(run_dir.name, {"metrics.jsonl": Position()})["metrics.jsonl"]
    assert (chunk.after.attempt, chunk.sealed) == (1, False)
    step_row(first, 2)
    second = claim(run_dir, start=1)
    step_row(first, 3)  # behind the seal
    step_row(second, 2)
    rest = site.read(run_dir.name, {"metrics.jsonl": chunk.after})["metrics.jsonl"]
    assert [(part.after.attempt, part.data.count(b"\n"), part.sealed) for part in rest] == [
        (1, 1, True),
        (2, 1, False),
    ]
