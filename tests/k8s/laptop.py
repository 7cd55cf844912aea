"""A laptop that is set up for a cluster of the tests."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from api_server import write_kubeconfig
from small_cluster import IMAGE, ROOT


def write_laptop(folder: Path, address: str) -> Path:
    """A kubeconfig, a clusters file, and the folder that stands for the volume, which is given."""
    volume = folder / "volume"
    volume.mkdir()
    plain = {"kind": "kubernetes", "image": IMAGE, "root": str(volume), "python": sys.executable}
    (folder / "clusters.yaml").write_text(yaml.safe_dump({"k8s": plain}))
    write_kubeconfig(folder / "kubeconfig", address, "client")
    return volume


def configure(folder: Path, **changes: object) -> None:
    """Say something else of the cluster in a clusters file, or more."""
    path = folder / "clusters.yaml"
    plain = yaml.safe_load(path.read_text())["k8s"]
    path.write_text(yaml.safe_dump({"k8s": {**plain, **changes}}))


def use_laptop(folder: Path, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Have this process be on that laptop, with what it knows in `home`."""
    patch.setenv("FLEETUNE_CLUSTERS", str(folder / "clusters.yaml"))
    patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("FLEETUNE_HOME", str(home))
