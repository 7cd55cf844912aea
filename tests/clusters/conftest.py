"""A local cluster without Ray: a sleeping process stands for a controller."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import local as local_module
from clusters import supervisor
from clusters.local import Local


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """A cluster with room for two workers, whose supervisor is ours to tick and whose controllers sleep."""
    monkeypatch.setattr(local_module, "total_capacity", lambda: ("cpu", 2))
    monkeypatch.setattr(supervisor, "total_capacity", lambda: ("cpu", 2))
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(local_module, "controller_command", lambda _: sleeper)
    monkeypatch.setattr(Local, "start", lambda self: (self.folder / "controllers").mkdir(parents=True, exist_ok=True))
    found = Local(tmp_path)
    (found.folder / "logs").mkdir(parents=True)
    yield found
    found.stop()
