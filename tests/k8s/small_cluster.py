"""What there is in the clusters of these tests: a node, a pod of the reader, and what a client may do."""

import os
from pathlib import Path
from typing import Any

from api_server import Cluster

from k8s.planned import READER_LABEL

ROOT = Path(__file__).parents[2]
IMAGE = f"registry.example.org/team/fleetune@sha256:{'0' * 64}"
# What a client may do: what each rule of its role is for; it has nothing beside.
NEEDED = {
    ("ray.io", "rayjobs"): {"create", "delete", "get", "list"},
    ("", "pods"): {"list"},
    ("", "nodes"): {"list"},
    ("", "pods/exec"): {"create", "get"},
    ("kueue.x-k8s.io", "workloads"): {"list"},
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
    return {"metadata": {"name": name, "labels": labels}, "spec": {"containers": []}, "status": status}


def small_cluster(folder: Path) -> Cluster:
    """A cluster whose client has the rights of the role, and nothing else; pods have a folder as HOME."""
    allowed = {(verb, resource) for (_, resource), verbs in NEEDED.items() for verb in verbs}
    cluster = Cluster(tokens={"client": allowed}, nodes=[NODE])
    cluster.objects["pods", "reader-1"] = reader("reader-1", True)
    cluster.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "FLEETUNE_POD": "reader-1"}
    return cluster
