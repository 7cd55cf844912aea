"""A local cluster without Ray, where a sleeping process stands for a controller; and programs in place of SLURM's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import entry, machine, supervisor
from clusters import local as local_module
from clusters import requeue as requeueing
from clusters.local import Local


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """A cluster with room for two workers, whose supervisor is ours to tick and whose controllers sleep."""
    monkeypatch.setattr(local_module, "total_capacity", lambda: ("cpu", 2))
    monkeypatch.setattr(machine, "total_capacity", lambda: ("cpu", 2))
    monkeypatch.setattr(supervisor, "total_capacity", lambda: ("cpu", 2))
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(entry, "controller_command", lambda _: sleeper)
    monkeypatch.setattr(Local, "start", lambda self: (self.folder / "controllers").mkdir(parents=True, exist_ok=True))
    found = Local(tmp_path)
    (found.folder / "logs").mkdir(parents=True)
    yield found
    found.stop()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets what scontrol is asked; programs are looked for in `tmp_path`/bin first."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setattr(requeueing, "_REPEAT_S", 0.01)
    (tmp_path / "bin").mkdir()
    return tmp_path / "asked"
