"""Runs on Kubernetes that really train: the pods of a RayJob are processes here, with real Ray in them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Cluster
from contract import NodeContract, QueueContract, RunContract
from kubelet import Kubelet
from kuberay import KubeRay
from kubernetes_place import KubernetesPlace

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")


@pytest.fixture
def place(laptop: Path, cluster: Cluster, tmp_path: Path) -> Iterator[KubernetesPlace]:
    """The cluster of the laptop, with an operator."""
    configure(tmp_path)
    logs = tmp_path / "pods"
    logs.mkdir()
    operator = KubeRay(cluster, Kubelet(cluster, logs), time_scale=0.02)
    yield KubernetesPlace("k8s", laptop, operator)
    operator.stop()
    assert operator.error is None


def configure(folder: Path, **changes: Any) -> None:
    """Have pods be small, and with one thread."""
    path = folder / "clusters.yaml"
    plain = yaml.safe_load(path.read_text())["k8s"]
    plain |= {"cpus_per_worker": 1, "env": {"OMP_NUM_THREADS": "1"}, **changes}
    path.write_text(yaml.safe_dump({"k8s": plain}))


class TestQueue(QueueContract):
    """Runs that wait."""


@pytest.mark.chaos
class TestRuns(RunContract):
    """Runs on one worker."""


class TestNodes(NodeContract):
    """Runs over both nodes."""
