"""A home and a local cluster of its own for each module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.local import Local


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """FLEETUNE_HOME in a temporary folder; requests to MLflow give up soon."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(folder))
        patch.setenv("FLEETUNE_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        yield folder


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Local]:
    """The local cluster of the home, stopped at the end."""
    found = Local(home)
    try:
        yield found
    finally:
        found.stop()
