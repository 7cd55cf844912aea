"""Why a run does not start or go on, by its pods and the warnings of its namespace."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from api_server import Cluster

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters import kubernetes_api
from clusters.base import ClusterStatus
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from k8s.planned import RUN_LABEL
from orchestrator.backends import config_of
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"
RAYJOB = f"{RUN_ID}-s1"
EVENTS = "/api/v1/namespaces/fleetune/events"
NO_NODE = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."


@pytest.fixture
def backend(laptop: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    """A cluster without a queue, to which a run was submitted just now."""
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    config = config_of("k8s")
    assert isinstance(config, KubernetesConfig)
    backend = Kubernetes(config, laptop)
    backend.submit(backend.request(JOB, RUN_ID))
    stored = cluster.objects["rayjobs", RAYJOB]
    stored["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat(timespec="seconds")
    stored["status"] = {"jobDeploymentStatus": "Initializing"}
    return backend


def status(backend: Kubernetes) -> ClusterStatus:
    return backend.status([RUN_ID])[RUN_ID]


def have_pod(cluster: Cluster, node: str = "gpu-1", **status: Any) -> None:
    """A pod of the run, with this status."""
    labels = {"app.kubernetes.io/managed-by": "fleetune", RUN_LABEL: RUN_ID, "ray.io/cluster": f"{RAYJOB}-x2v4t"}
    metadata = {"name": "w", "labels": labels}
    spec = {"containers": [], "nodeName": node}
    cluster.objects["pods", "w"] = {"metadata": metadata, "spec": spec, "status": status}


def running(cluster: Cluster, ray_cluster: str = f"{RAYJOB}-x2v4t") -> None:
    """Have the run's RayJob run, with a cluster of Ray."""
    status = {"jobDeploymentStatus": "Running", "rayClusterName": ray_cluster}
    cluster.objects["rayjobs", RAYJOB]["status"] = status


def container(**state: Any) -> list[dict[str, Any]]:
    return [{"name": "ray", "ready": False, **state}]


def have_warning(cluster: Cluster, name: str, message: str, when: str, reason: str = "FailedMount") -> None:
    cluster.general.stored[f"{EVENTS}/{name}.{when}"] = {
        "kind": "Event",
        "metadata": {"name": f"{name}.{when}"},
        "involvedObject": {"kind": "Pod", "name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": when,
    }


@pytest.mark.parametrize(
    ("found", "words", "is_stuck"),
    [
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."},
            "pod w has failed (Evicted: The node was low on resource: ephemeral-storage.)",
            False,
        ),
        (
            {"phase": "Failed", "containerStatuses": container(state={"terminated": {"exitCode": 127}})},
            "pod w: container ray ended with exit code 127 (no reason given)",
            True,
        ),
        (
            {
                "phase": "Failed",
                "containerStatuses": container(state={"terminated": {"exitCode": 1, "reason": "OOMKilled"}}),
            },
            "pod w: container ray ended with exit code 1 (OOMKilled)",
            False,
        ),
        (
            {
                "phase": "Pending",
                "initContainerStatuses": [{"name": "wait-gcs-ready", "state": {"running": {}}}],
                "containerStatuses": container(state={"waiting": {"reason": "PodInitializing"}}),
            },
            f"RayJob {RAYJOB}: 0 of 1 pods are ready; pod w waits in its init container wait-gcs-ready",
            False,
        ),
    ],
)
def test_what_the_pods_say_is_said(
    found: dict[str, Any], words: str, is_stuck: bool, backend: Kubernetes, cluster: Cluster
) -> None:
    have_pod(cluster, **found)
    assert status(backend) == ClusterStatus("starting", words, is_stuck)
    cluster.objects["pods", "w"]["metadata"]["deletionTimestamp"] = "2026-11-22T02:50:53Z"  # as one is made anew
    assert words not in status(backend).reason


def test_a_run_that_waits_for_a_pod_that_replaces_one_says_why(backend: Kubernetes, cluster: Cluster) -> None:
    running(cluster)
    no_node = {"type": "PodScheduled", "status": "False", "message": NO_NODE}
    have_pod(cluster, "", phase="Pending", conditions=[no_node])
    assert status(backend) == ClusterStatus("running", f"RayJob {RAYJOB}: pod w has no node: {NO_NODE}")
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no"}}
    have_pod(cluster, phase="Pending", containerStatuses=container(state=waiting))
    assert status(backend).reason == f"RayJob {RAYJOB}: pod w: ErrImagePull: no"
    have_pod(cluster, phase="Running", containerStatuses=[{"ready": True}])
    cluster.requests.clear()
    assert status(backend) == ClusterStatus("running", f"RayJob {RAYJOB}")
    assert f"fleetune/run%3D{RUN_ID}" in cluster.requests[-1] and "status.phase" not in cluster.requests[-1]


def test_a_run_that_has_lost_a_node_says_so(backend: Kubernetes, cluster: Cluster) -> None:
    running(cluster)
    have_pod(cluster, phase="Running", containerStatuses=[{"ready": False}])
    assert status(backend).reason == f"RayJob {RAYJOB}: pod w is not ready, or its node is lost"
    cluster.objects["pods", "w"]["metadata"]["deletionTimestamp"] = "2026-11-22T02:50:53Z"
    assert status(backend).reason == f"RayJob {RAYJOB}: pod w is to end, and KubeRay replaces it once it is gone"
    running(cluster, "another cluster")
    assert status(backend) == ClusterStatus("running", f"RayJob {RAYJOB}")


def test_of_runs_that_run_the_pods_that_start_are_looked_at(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, "b-0123456789"))
    for name in cluster.created:
        cluster.objects["rayjobs", name]["status"] = {"jobDeploymentStatus": "Running"}
    cluster.requests.clear()
    backend.status([RUN_ID, "b-0123456789"])
    assert "status.phase%3DPending" in cluster.requests[-1]


def test_what_events_alone_say_is_asked_for_a_run_that_starts_for_long(backend: Kubernetes, cluster: Cluster) -> None:
    waiting = {"waiting": {"reason": "ContainerCreating"}}
    have_pod(cluster, phase="Pending", containerStatuses=container(state=waiting))
    have_warning(cluster, f"{RAYJOB}-x2v4t-head", "older", "2026-11-22T02:50:53Z")
    have_warning(cluster, f"{RAYJOB}-x2v4t-head", "mount\nfailed", "2026-11-22T02:51:53Z")
    have_warning(cluster, f"{RAYJOB}0-x2v4t-head", "of another", "2026-11-22T02:52:53Z")
    short = f"RayJob {RAYJOB}: 0 of 1 pods are ready"
    cluster.requests.clear()
    assert status(backend) == ClusterStatus("starting", short)
    assert not any("/events" in request for request in cluster.requests)
    cluster.objects["rayjobs", RAYJOB]["metadata"]["creationTimestamp"] = "2026-11-22T02:50:53Z"
    words = f"{short}; Pod {RAYJOB}-x2v4t-head: FailedMount: mount failed"
    assert status(backend) == ClusterStatus("starting", words)
    assert sum("/events" in request for request in cluster.requests) == 1
    cluster.fault = lambda _: "503" if "/events" in cluster.requests[-1] else None
    assert status(backend) == ClusterStatus("starting", short)


def test_a_batch_scheduler_that_lets_no_pods_be_made_is_said(backend: Kubernetes, cluster: Cluster) -> None:
    assert status(backend) == ClusterStatus("queued", f"RayJob {RAYJOB}: KubeRay has made no pods of it yet")
    cluster.objects["rayjobs", RAYJOB]["metadata"]["labels"]["ray.io/gang-scheduling-enabled"] = "true"
    assert "scheduler-plugins" in status(backend).reason


def test_a_run_in_the_default_queue_of_its_namespace_is_looked_at_there(
    backend: Kubernetes, cluster: Cluster
) -> None:
    stored = cluster.objects["rayjobs", RAYJOB]
    stored["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "default"  # by Kueue itself
    stored["spec"]["suspend"] = True
    owner = {"kind": "RayJob", "name": RAYJOB}
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient quota"}
    cluster.objects["workloads", "a"] = {
        "metadata": {"name": "a", "ownerReferences": [owner]},
        "status": {"conditions": [condition]},
    }
    assert status(backend) == ClusterStatus("queued", "Kueue: insufficient quota")
