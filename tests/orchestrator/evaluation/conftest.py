"""One home for all tests of this folder: making MLflow's schema takes seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One FLEETUNE_HOME."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(folder))
        patch.setattr("orchestrator.tracking.environment.SAMPLE_S", 1e9)
        yield folder
