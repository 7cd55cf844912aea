"""A cluster behind a server of the tests, and a laptop that is set up for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import Cluster, served
from laptop import use_laptop, write_laptop
from small_cluster import small_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster whose client has the rights of the role, and nothing else."""
    return small_cluster(tmp_path)


@pytest.fixture
def laptop(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A laptop with a kubeconfig and a clusters file; gives the folder that stands for the claim."""
    with served(cluster) as address:
        claim = write_laptop(tmp_path, address)
        use_laptop(tmp_path, tmp_path / "home", monkeypatch)
        yield claim
