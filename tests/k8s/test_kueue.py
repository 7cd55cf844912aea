"""Why a run waits: what Kueue, KubeRay and quotas say of it, in words, with its place in the queue."""

from pathlib import Path
from typing import Any

import api_server
import pytest
from api_server import Cluster

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters import kubernetes, kubernetes_api
from clusters.base import ClusterStatus
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from orchestrator.backends import config_of
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"
RAYJOB = f"{RUN_ID}-s1"
OWNED = {"name": "rayjob-a", "ownerReferences": [{"kind": "RayJob", "name": RAYJOB}]}
NO_QUOTA = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu"


@pytest.fixture
def backend(laptop: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    """A cluster with a queue, in which a run waits."""
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(kubernetes, "note_try_in", lambda *_: None)  # there is no run folder
    config = config_of("k8s")
    assert isinstance(config, KubernetesConfig)
    queued = config.model_copy(update={"queue": "team-a", "queue_priority": "urgent", "priority_class": "high"})
    backend = Kubernetes(queued, laptop)
    backend.submit(backend.request(JOB, RUN_ID))
    cluster.objects["rayjobs", RAYJOB]["status"] = {"jobDeploymentStatus": "Suspended"}
    return backend


def condition(kind: str, status: str, reason: str = "Pending", message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def workload(*conditions: dict[str, str], **spec: Any) -> dict[str, Any]:
    return {"metadata": OWNED, "spec": spec, "status": {"conditions": [*conditions]}}


def place(name: str, local: int, total: int, priority: int = 0) -> dict[str, Any]:
    """What Kueue's own server says of a workload that waits; it counts from 0."""
    return {
        "metadata": {"name": name, "ownerReferences": [{"kind": "RayJob", "name": name}]},
        "queue": "team-a",
        "priority": priority,
        "positionInLocalQueue": local,
        "positionInClusterQueue": total,
    }


def status(backend: Kubernetes) -> ClusterStatus:
    return backend.status([RUN_ID])[RUN_ID]


def test_its_place_is_said_with_the_reason(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.objects["workloads", "rayjob-a"] = workload(condition("QuotaReserved", "False", message=NO_QUOTA))
    cluster.general.pending = [place("b-s1", 0, 3), place(RAYJOB, 1, 7, priority=100)]
    found = status(backend)
    assert (found.state, found.stuck) == ("queued", False)
    assert found.reason == (
        f"Kueue: place 2 of 2 in queue team-a, place 8 in its cluster queue, priority 100; {NO_QUOTA}"
    )


@pytest.mark.parametrize(
    ("waiting", "words", "is_stuck"),
    [
        (workload(condition("QuotaReserved", "False", message=NO_QUOTA)), NO_QUOTA, False),
        (
            workload(
                condition("Evicted", "True", "Preempted", "for another"),
                condition("QuotaReserved", "False", message="no\nroom"),
            ),
            "it was evicted (Preempted); no room",
            False,
        ),
        (
            workload(condition("QuotaReserved", "False", "Inadmissible", "LocalQueue team-a doesn't exist")),
            "LocalQueue team-a doesn't exist",
            True,
        ),
        (
            workload(condition("QuotaReserved", "True"), condition("Admitted", "False", message="checks wait")),
            "checks wait",
            False,
        ),
        (workload(active=False), "its workload was deactivated (spec.active is false)", True),
        (None, "it waits for queue team-a to admit it", False),
    ],
)
def test_what_kueue_says_is_the_reason(
    waiting: dict[str, Any] | None, words: str, is_stuck: bool, backend: Kubernetes, cluster: Cluster
) -> None:
    if waiting:
        cluster.objects["workloads", "rayjob-a"] = waiting
    assert status(backend) == ClusterStatus("queued", f"Kueue: {words}", is_stuck)


def test_a_newer_kueue_is_asked_in_its_own_version(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(api_server.COLLECTIONS, "/apis/kueue.x-k8s.io/v1beta1")
    monkeypatch.setitem(api_server.COLLECTIONS, "/apis/kueue.x-k8s.io/v1beta2", ("workloads",))
    cluster.objects["workloads", "rayjob-a"] = workload(condition("QuotaReserved", "False", message=NO_QUOTA))
    assert status(backend).reason == f"Kueue: {NO_QUOTA}"
    monkeypatch.delitem(api_server.COLLECTIONS, "/apis/kueue.x-k8s.io/v1beta2")
    assert "why is not known" in status(backend).reason


def test_a_place_that_nobody_tells_holds_nothing_up(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.general.pending = [place(RAYJOB, 0, 0)]
    cluster.objects["workloads", "rayjob-a"] = workload(condition("QuotaReserved", "False", message=NO_QUOTA))
    cluster.fault = lambda _: "503" if "/apis/visibility." in cluster.requests[-1] else None
    asked = len(cluster.requests)
    assert status(backend).reason == f"Kueue: {NO_QUOTA}"
    assert sum("pendingworkloads" in request for request in cluster.requests[asked:]) == 1


def test_a_queue_that_is_not_there_is_named(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.general.pending = []
    cluster.general.queues = {"team-b"}
    assert 'localqueue.visibility.kueue.x-k8s.io "team-a" not found' in status(backend).reason


def test_one_that_nobody_would_admit_is_told_so(backend: Kubernetes, cluster: Cluster) -> None:
    del cluster.objects["rayjobs", RAYJOB]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    without_queue = Kubernetes(backend.config.model_copy(update={"queue": None}), backend.home)
    assert status(without_queue).reason == f"RayJob {RAYJOB} is suspended, and no queue is named that would admit it"


@pytest.mark.parametrize(
    ("message", "state", "is_stuck"),
    [
        ('pods "head" is forbidden: exceeded quota: q, requested: cpu=2', "queued", False),
        ('pods "head" is forbidden: no PriorityClass with name high was found', "starting", True),
        ('pods "head" is forbidden: violates PodSecurity "restricted:latest"', "starting", True),
    ],
)
def test_pods_that_cannot_be_made_are_no_silence(
    message: str, state: str, is_stuck: bool, backend: Kubernetes, cluster: Cluster
) -> None:
    failure = condition("ReplicaFailure", "True", "FailedCreateHeadPod", f"Failed to create\nhead pod: {message}")
    cluster.objects["rayjobs", RAYJOB]["status"] = {
        "jobDeploymentStatus": "Initializing",
        "rayClusterStatus": {"conditions": [failure]},
    }
    found = status(backend)
    assert (found.state, found.stuck) == (state, is_stuck)
    assert found.reason == f"KubeRay cannot make a pod: Failed to create head pod: {message}"


def test_queue_and_priorities_are_in_the_manifest(backend: Kubernetes, cluster: Cluster) -> None:
    assert backend.config.queue == "team-a"
    rayjob = cluster.objects["rayjobs", RAYJOB]
    labels = rayjob["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team-a"
    assert labels["kueue.x-k8s.io/priority-class"] == "urgent"
    ray_cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["priorityClassName"] == "high"
