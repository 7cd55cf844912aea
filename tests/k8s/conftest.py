"""A cluster behind a server of the tests, and a laptop that is set up for it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import Cluster, served
from laptop import use_laptop, write_laptop
from small_cluster import small_cluster

from clusters.remote.code import installed_code


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster in which `fleetune k8s install` was run, and whose client has the account that it makes."""
    return small_cluster(tmp_path)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fleetune's code as it lies on a volume to which it was sent; that it is sent is seen in test_reader.py."""
    code = installed_code()
    folder = tmp_path_factory.mktemp("code") / code.digest
    for name, data in code.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def laptop(cluster: Cluster, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A laptop with a kubeconfig and a clusters file; gives the folder that stands for the volume."""
    with served(cluster) as address:
        volume = write_laptop(tmp_path, address)
        shutil.copytree(code, volume / "code" / code.name, copy_function=os.link)
        use_laptop(tmp_path, tmp_path / "home", monkeypatch)
        yield volume
