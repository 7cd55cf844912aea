"""What there is in the clusters of these tests: a node, a pod of the reader, and what a client may do."""

import os
import sys
from pathlib import Path
from typing import Any

from api_server import Cluster

from clusters.kubernetes_install import path_of
from k8s.install import install_manifests
from k8s.planned import READER_LABEL
from k8s.settings import KubernetesSettings

ROOT = Path(__file__).parents[2]
IMAGE = f"registry.example.org/team/fleetune@sha256:{'0' * 64}"
# What a client may do: what each rule of its role is for; it has nothing beside.
NEEDED = {
    ("ray.io", "rayjobs"): {"create", "delete", "get", "list"},
    ("ray.io", "rayservices"): {"create", "delete", "get", "list"},
    ("", "pods"): {"list"},
    ("", "events"): {"list"},
    ("", "nodes"): {"list"},
    ("", "pods/exec"): {"create", "get"},
    ("", "persistentvolumeclaims"): {"get"},
    ("", "resourcequotas"): {"list"},
    ("kueue.x-k8s.io", "workloads"): {"list"},
    ("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads"): {"get"},
}
NODE = {
    "metadata": {"name": "gpu-1"},
    "spec": {},
    "status": {
        "allocatable": {"cpu": "32", "nvidia.com/gpu": "8"},
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}


def reader(name: str, ready: bool) -> dict[str, Any]:
    """A pod of the reader."""
    labels = {READER_LABEL: "true", "app.kubernetes.io/managed-by": "fleetune"}
    status = {"phase": "Running", "containerStatuses": [{"ready": ready}]}
    spec = {"containers": [{"image": IMAGE}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec, "status": status}


def install_as_admin(cluster: Cluster, **changes: Any) -> None:
    """Have in a cluster what `fleetune k8s install` makes, a volume that is bound, and one client of its account."""
    cluster.tokens["admin"] = None
    settings = KubernetesSettings.model_validate({"image": IMAGE, **changes})
    for manifest in install_manifests(settings, "/fleetune"):
        path = path_of(manifest)
        assert cluster.answer("PATCH", path, {"fieldManager": "fleetune"}, manifest, "admin")[0] == 201
    bind_volume(cluster)
    cluster.tokens = {"client": cluster.general.rights("fleetune-client")}


def bind_volume(cluster: Cluster) -> None:
    """Have a volume get its storage."""
    for stored in cluster.general.stored.values():
        if stored["kind"] == "PersistentVolumeClaim":
            stored["spec"]["storageClassName"] = "nfs"
            stored["status"] = {"phase": "Bound", "capacity": {"storage": "2Ti"}}


def small_cluster(folder: Path) -> Cluster:
    """A cluster in which `fleetune k8s install` was run; pods have a folder as HOME."""
    cluster = Cluster(nodes=[NODE])
    install_as_admin(cluster)
    cluster.objects["pods", "reader-1"] = reader("reader-1", True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cluster.environment = {"PATH": path, "HOME": str(folder), "FLEETUNE_POD": "reader-1"}
    return cluster
