"""A local cluster of its own for each module, and a plain, undisturbed run to compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.local import Local


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Local]:
    """The local cluster of a home in a temporary folder, stopped at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("FLEETUNE_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        found = Local.here()
        try:
            yield found
        finally:
            found.stop()
