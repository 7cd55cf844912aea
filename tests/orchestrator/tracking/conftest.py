"""One home and one MLflow server for all tests of this folder: making MLflow's schema takes seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import Server


@pytest.fixture(scope="package", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One FLEETUNE_HOME; requests give up after two seconds."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(folder))
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.chdir(folder)
        patch.setattr("orchestrator.tracking.environment.SAMPLE_S", 1e9)
        yield folder
    assert not (folder / "mlruns").exists(), "MLflow left a folder where the user happened to be"


@pytest.fixture(scope="package")
def stopped(home: Path) -> Iterator[Server]:
    """A server, which the first test starts that needs it."""
    made = Server(f"sqlite:///{home}/server.db")
    yield made
    made.kill()


@pytest.fixture
def server(stopped: Server) -> Server:
    stopped.start()
    return stopped
