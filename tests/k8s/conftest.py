"""A cluster behind a server of the tests, and a laptop that is set up for it."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from api_server import Cluster, served, write_kubeconfig
from small_cluster import IMAGE, NODE, ROOT, install_as_admin, reader

from clusters.remote.code import installed_code


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster in which `fleetune k8s install` was run, and whose client has the account that it makes."""
    cluster = Cluster(nodes=[NODE])
    install_as_admin(cluster)
    cluster.objects["pods", "reader-1"] = reader("reader-1", True)
    cluster.environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "FLEETUNE_POD": "reader-1"}
    return cluster


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fleetune's code as it lies on a claim to which it was sent; that it is sent is seen in test_reader.py."""
    code = installed_code()
    folder = tmp_path_factory.mktemp("code") / code.digest
    for name, data in code.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def laptop(cluster: Cluster, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A laptop with a kubeconfig and a clusters file; gives the folder that stands for the claim."""
    claim = tmp_path / "claim"
    shutil.copytree(code, claim / "code" / code.name, copy_function=os.link)
    plain = {"kind": "kubernetes", "image": IMAGE, "root": str(claim), "python": sys.executable}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"k8s": plain}))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    with served(cluster) as address:
        write_kubeconfig(tmp_path / "kubeconfig", address, "client")
        yield claim
