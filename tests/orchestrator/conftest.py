"""A home for runs that are submitted, and never started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import only_queued


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty FLEETUNE_HOME whose local cluster starts nothing."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    with only_queued(tmp_path / "home"):
        yield tmp_path / "home"
