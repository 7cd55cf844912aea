"""Submissions through the API: exactly once, whatever breaks, and what is said of each run.

The official client speaks HTTP to a server of the tests (api_server.py), whose faults come from a seed.
"""

import copy
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from api_server import FAULTS, Cluster, served, write_kubeconfig
from sampling import SEED

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters import kubernetes, kubernetes_api
from clusters.base import ClusterRequest, SubmissionRefused, Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from k8s.planned import RUN_LABEL
from runfolder.job import Job

IMAGE = f"registry.example.org/team/fleetune@sha256:{'0' * 64}"
JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"
TRIALS = 10_000
VERBS = ("create", "delete", "get", "list")
ALLOWED = {("list", "pods"), *((verb, kind) for verb in VERBS for kind in ("rayjobs", "rayservices"))}


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(tokens={"admin": None, "client": set(ALLOWED)})


@pytest.fixture
def address(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of its server, which the kubeconfig has; nobody waits between two tries, or submits runs again.

    There is no reader, who would be asked for the latest start of a run, and told of a submission: test_keeper.py.
    """
    monkeypatch.setattr(kubernetes, "submit_again", lambda *_: {})
    monkeypatch.setattr(Kubernetes, "ask_reader", lambda *_: 0)
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(kubernetes_api, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with served(cluster) as address:
        write_kubeconfig(tmp_path / "kubeconfig", address, "client")
        yield address


@pytest.fixture
def backend(address: str) -> Kubernetes:
    """The cluster, as a laptop has it."""
    assert address
    return opened()


def opened(**changes: Any) -> Kubernetes:
    config = KubernetesConfig.model_validate({"kind": "kubernetes", "image": IMAGE, **changes})
    return Kubernetes.open(config, Path(config.root))


def names(cluster: Cluster) -> list[str]:
    return [name for kind, name in cluster.objects if kind == "rayjobs"]


def set_status(cluster: Cluster, name: str = f"{RUN_ID}-s1", **status: Any) -> None:
    """What KubeRay's operator would write."""
    cluster.objects["rayjobs", name]["status"] = status


def test_a_repeated_submission_is_one(backend: Kubernetes, cluster: Cluster) -> None:
    request = backend.request(JOB, RUN_ID)
    for _ in range(2):
        backend.submit(request)
        assert opened().forecast(request) is None
    assert cluster.created == [f"{RUN_ID}-s1"]
    stored = cluster.objects["rayjobs", f"{RUN_ID}-s1"]
    assert stored["metadata"]["labels"][RUN_LABEL] == RUN_ID


def test_a_run_that_goes_on_gets_no_second_job_and_one_that_ended_does(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, RUN_ID))
    second = backend.request(JOB, RUN_ID, None)
    assert second.submission == 2
    for deployment in ("", "Initializing", "Running", "Retrying", "Suspended"):
        set_status(cluster, jobDeploymentStatus=deployment)
        backend.submit(second)
        assert names(cluster) == [f"{RUN_ID}-s1"]
    set_status(cluster, jobDeploymentStatus="Failed", reason="AppFailed")
    backend.submit(second)
    assert cluster.created == [f"{RUN_ID}-s1", f"{RUN_ID}-s2"]


OTHER_RUN = "is there already, and is not of run a-0123456789: somebody else has made it"
OTHER_VERSION = (
    "is there already, and not as this would make it: it was made by another version of Fleetune or of the"
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {}}, OTHER_RUN),
        ({"labels": None}, OTHER_RUN),
        ({"annotations": None}, OTHER_RUN),
        ({"annotations": {"fleetune/digest": "0" * 64}}, OTHER_VERSION),
    ],
)
def test_a_name_that_is_taken_by_another_is_no_submission(
    changes: dict[str, Any], words: str, backend: Kubernetes, cluster: Cluster
) -> None:
    request = backend.request(JOB, RUN_ID)
    backend.submit(request)
    stored = cluster.objects["rayjobs", request.name]
    for name, value in changes.items():
        stored["metadata"].pop(name)
        stored["metadata"] |= {name: value} if value is not None else {}
    before = copy.deepcopy(cluster.objects)
    with pytest.raises(SubmissionRefused, match=f"^RayJob {request.name} {words}") as refused:
        backend.submit(request)
    assert "\n" not in str(refused.value)
    assert cluster.objects == before


def test_what_goes_on_by_an_earlier_submission_has_another_digest(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, RUN_ID))
    set_status(cluster, jobDeploymentStatus="Running")
    other = opened(cpus_per_worker=1)
    other.submit(other.request(JOB, RUN_ID, None))
    assert cluster.created == [f"{RUN_ID}-s1"]


def test_a_quota_that_the_submission_itself_uses_up_is_no_refusal(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.quota = 1
    faults = iter(["", "cut after"])
    cluster.fault = lambda _: next(faults, None)
    backend.submit(backend.request(JOB, RUN_ID))
    assert cluster.created == [f"{RUN_ID}-s1"]
    other = "b-0123456789"
    with pytest.raises(SubmissionRefused, match="does not take this job: rayjobs.ray.io .* exceeded quota"):
        backend.submit(backend.request(JOB, other))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"namespace": "elsewhere"}, Unreachable, 'namespaces "elsewhere" not found'),
        ({"token": "nobody"}, Unreachable, "Unauthorized: log in again, as for kubectl"),
        (
            {"allowed": {("list", "rayjobs"), ("get", "rayjobs")}},
            SubmissionRefused,
            'cannot create resource "rayjobs"',
        ),
        ({"allowed": set()}, SubmissionRefused, 'cannot create resource "rayjobs"'),
    ],
)
def test_what_is_for_good_is_told_from_what_may_pass(
    change: dict[str, Any], error: type[Exception], words: str, address: str, cluster: Cluster, tmp_path: Path
) -> None:
    if "token" in change:
        write_kubeconfig(tmp_path / "kubeconfig", address, change["token"])
    cluster.tokens["client"] = change.get("allowed", set(ALLOWED))
    backend = opened(namespace=change.get("namespace", "fleetune"))
    request = backend.request(JOB, RUN_ID)
    with pytest.raises(error, match=words):
        backend.forecast(request)
    assert cluster.created == []


def test_who_may_not_look_is_told_so(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.tokens["client"] = set()
    with pytest.raises(Unreachable, match="^Kubernetes: rayjobs.ray.io is forbidden: .* cannot list"):
        backend.status([RUN_ID])


def test_what_only_has_our_label_is_no_submission(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, RUN_ID))
    stored = cluster.objects["rayjobs", f"{RUN_ID}-s1"]
    cluster.objects["rayjobs", "mine"] = stored | {"metadata": stored["metadata"] | {"name": "mine"}}
    assert backend.status([RUN_ID])[RUN_ID].state == "queued"
    assert backend.request(JOB, RUN_ID, None).submission == 2


def test_a_server_that_is_away_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(Unreachable, match="kubeconfig: "):
        opened().status([RUN_ID])
    with served(cluster) as address:
        write_kubeconfig(tmp_path / "kubeconfig", address)
    with pytest.raises(Unreachable, match=f"Kubernetes: {address}: "):
        opened().status([RUN_ID])


@pytest.mark.parametrize("text", ["a: [", "- a", "{}", "clusters: 3"])
def test_a_kubeconfig_that_is_none_is_said(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(Unreachable, match="^Kubernetes: kubeconfig: .") as said:
        opened().status([RUN_ID])
    assert "\n" not in str(said.value)


def test_an_empty_variable_names_the_kubeconfig_of_the_home(
    address: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert address
    (tmp_path / ".kube").mkdir()
    (tmp_path / "kubeconfig").rename(tmp_path / ".kube" / "config")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", "")
    assert opened().api.listed("RayJob", "") == [] and len(cluster.requests) == 1


def test_a_node_that_has_just_come_is_none_yet(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.tokens["client"] = None
    ready = [{"type": "Ready", "status": "True"}]
    cluster.nodes = [{"metadata": {"name": "new"}, "spec": {}, "status": {"conditions": ready}}]
    assert backend.capacity().total == 0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([("NVIDIA-H200", "143771")] * 2, ("NVIDIA-H200", 143771 * 2**20)),
        ([("NVIDIA-H200", "143771"), ("NVIDIA-A100-SXM4-80GB", "81920")], (None, 81920 * 2**20)),
        ([("NVIDIA-H200", "143771"), None], (None, None)),
    ],
)
def test_what_gpus_have_is_told_by_labels_of_nodes(
    backend: Kubernetes,
    cluster: Cluster,
    labels: list[tuple[str, str] | None],
    expected: tuple[str | None, int | None],
) -> None:
    cluster.tokens["client"] = None
    ready = {"allocatable": {"nvidia.com/gpu": "8", "cpu": "9"}, "conditions": [{"type": "Ready", "status": "True"}]}
    cluster.nodes = [{"metadata": {"name": "cores"}, "spec": {}, "status": {**ready, "allocatable": {"cpu": "4"}}}]
    for number, of_node in enumerate(labels):
        metadata: dict[str, Any] = {"name": f"n{number}"}
        if of_node:
            metadata["labels"] = dict(zip(("nvidia.com/gpu.product", "nvidia.com/gpu.memory"), of_node, strict=True))
        cluster.nodes.append({"metadata": metadata, "spec": {}, "status": ready})
    capacity = backend.capacity()
    assert (capacity.total, capacity.gpu, capacity.gpu_bytes) == (16, *expected)


def test_status_of_many_runs_is_one_list(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, RUN_ID))
    stored = cluster.objects.pop(("rayjobs", f"{RUN_ID}-s1"))
    run_ids = [f"a-{number:010}" for number in range(500)]
    for run_id in run_ids:
        metadata = stored["metadata"] | {
            "name": f"{run_id}-s1",
            "labels": stored["metadata"]["labels"] | {RUN_LABEL: run_id},
        }
        running = stored | {"metadata": metadata, "status": {"jobDeploymentStatus": "Running"}}
        cluster.objects["rayjobs", f"{run_id}-s1"] = running
    cluster.requests.clear()
    statuses = backend.status(run_ids)
    assert {status.state for status in statuses.values()} == {"running"}
    assert len(cluster.requests) == 2  # pages of one list
    cluster.requests.clear()
    assert backend.status(run_ids[:1])[run_ids[0]].state == "running"
    of_run = "labelSelector=app.kubernetes.io/managed-by%3Dfleetune%2Cfleetune/run%3D"
    assert all(of_run in request for request in cluster.requests)  # however many there ever were


def test_a_list_that_is_too_old_begins_again(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "_PAGE", 2)
    for number in range(5):
        backend.submit(backend.request(JOB, f"a-{number:010}"))
    cluster.expired.add("4")
    asked = len(cluster.requests)

    def renew(_: str) -> None:
        if len(cluster.requests) - asked > 3:
            cluster.expired.clear()

    cluster.fault = renew
    assert len(backend.api.listed("RayJob", "")) == 5


def test_a_list_that_is_always_too_old_is_given_up(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[int] = []
    monkeypatch.setattr(kubernetes_api, "_PAGE", 2)
    monkeypatch.setattr(kubernetes_api, "_rest", lambda number, _: rests.append(number))
    for number in range(5):
        backend.submit(backend.request(JOB, f"a-{number:010}"))
    cluster.expired.add("4")

    def lasting(_: str) -> None:
        assert len(cluster.requests) < 100

    cluster.fault = lasting
    with pytest.raises(Unreachable, match="too old"):
        backend.api.listed("RayJob", "")
    assert rests == [1, 2, 3, 4]


@pytest.mark.usefixtures("address")
def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "_LIMITS", {"_request_timeout": (5.0, 0.2)})
    monkeypatch.setattr(kubernetes_api, "_LONGEST_TRIES_S", 0.3)
    heard: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    heard.append(server.accept()[0])

        threading.Thread(target=listen, daemon=True).start()
        write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{server.getsockname()[1]}", "client")
        with pytest.raises(Unreachable, match="Read timed out"):
            opened().api.listed("RayJob", "")
    assert 1 <= len(heard) <= 2


def pod(name: str, node: str = "gpu-1", **status: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "fleetune", RUN_LABEL: RUN_ID}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [], "nodeName": node},
        "status": status,
    }


UNSCHEDULABLE = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}
NO_QUOTA = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu"
WORKLOAD = {
    "metadata": {"name": "rayjob-a", "ownerReferences": [{"kind": "RayJob", "name": f"{RUN_ID}-s1"}]},
    "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": NO_QUOTA}]},
}


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize(
    ("status", "pods", "state", "reason"),
    [
        ({}, [], "queued", "KubeRay's operator has not taken it up yet"),
        ({"jobDeploymentStatus": "Suspended"}, [], "queued", f"Kueue: {NO_QUOTA}"),
        (
            {"jobDeploymentStatus": "Initializing"},
            [pod("head"), pod("w", conditions=[NO_NODE])],
            "queued",
            UNSCHEDULABLE,
        ),
        ({"jobDeploymentStatus": "Initializing"}, [], "queued", "KubeRay has made no pods of it yet"),
        (
            {"jobDeploymentStatus": "Initializing"},
            [pod("head"), pod("w", "")],
            "queued",
            "its pods have no nodes yet",
        ),
        (
            {"jobDeploymentStatus": "Initializing"},
            [pod("head", containerStatuses=[{"ready": True}]), pod("w")],
            "starting",
            "1 of 2 pods are ready",
        ),
        (
            {"jobDeploymentStatus": "Initializing"},
            [pod("w", containerStatuses=[{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}])],
            "starting",
            "pod w: ImagePullBackOff: no",
        ),
        ({"jobDeploymentStatus": "Running", "jobStatus": "Failure"}, [], "running", f"RayJob {RUN_ID}-s1"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, [], "running", f"RayJob {RUN_ID}-s1"),
        (
            {"jobDeploymentStatus": "Running", "jobStatusCheckFailureStartTime": "2026-11-22T02:50:53Z"},
            [],
            "running",
            f"RayJob {RUN_ID}-s1: its head has not answered since 2026-11-22T02:50:53Z",
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, [], "ended", ""),
        (
            {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "exit\ncode 1"},
            [],
            "unknown",
            f"RayJob {RUN_ID}-s1 failed (AppFailed: exit code 1); fleetune resume submits it again",
        ),
    ],
)
def test_what_kubernetes_says_is_said_in_words(
    status: dict[str, Any], pods: list[Any], state: str, reason: str, cluster: Cluster
) -> None:
    cluster.tokens["client"] = {*ALLOWED, ("list", "workloads")}
    backend = opened(queue="team-a")
    backend.submit(backend.request(JOB, RUN_ID))
    set_status(cluster, **status)
    cluster.objects["workloads", "rayjob-a"] = WORKLOAD
    for each in pods:
        cluster.objects["pods", each["metadata"]["name"]] = each
    found = backend.status([RUN_ID])[RUN_ID]
    assert found.state == state and reason in found.reason
    assert found.stuck == ("ImagePullBackOff" in reason)


def test_a_run_without_a_job_is_unknown(backend: Kubernetes) -> None:
    found = backend.status([RUN_ID])[RUN_ID]
    assert (found.state, found.stuck) == ("unknown", False)


def submitted_under(faults: random.Random, cluster: Cluster, request: ClusterRequest) -> Counter[str]:
    """One trial: a client submits, perhaps again and again, while requests fail; gives what happened."""
    happened: Counter[str] = Counter()
    share = faults.choice([0.2, 0.5, 0.8])

    def fault(_: str) -> str | None:
        if cluster.late and faults.random() < 0.3:
            cluster.settle()
        kind = faults.choice(FAULTS) if faults.random() < share else None
        happened[kind or "answered"] += 1
        return kind

    cluster.fault = fault
    cluster.quota = faults.choice([None, None, None, 1, 0])
    ending = ""
    for _ in range(faults.randrange(1, 4)):
        ending = ending_of(request)
        happened[ending] += 1
        if ending != "unknown":
            break
    cluster.settle()
    assert ending != "refused" or request.name not in names(cluster)
    assert ending != "submitted" or request.name in names(cluster)
    cluster.fault = lambda _: None
    if ending == "unknown":
        ending = ending_of(request)
    assert ending == ("refused" if cluster.quota == 0 else "submitted")
    assert cluster.created == ([] if ending == "refused" else [request.name]), ending
    return happened


def ending_of(request: ClusterRequest) -> str:
    """What a new client is told of a submission."""
    try:
        opened().submit(request)
    except Unreachable:
        return "unknown"
    except SubmissionRefused:
        return "refused"
    return "submitted"


@pytest.mark.parametrize("number", [500, pytest.param(TRIALS, marks=pytest.mark.chaos)])
@pytest.mark.usefixtures("address")
def test_whatever_breaks_there_is_one_job(number: int, cluster: Cluster) -> None:
    happened: Counter[str] = Counter()
    request = opened().request(JOB, RUN_ID)
    for seed in random.Random(SEED).sample(range(TRIALS), number):
        happened += submitted_under(random.Random(seed), cluster, request)
        cluster.objects.clear()
        cluster.created.clear()
    assert all(happened[name] > number // 50 for name in (*FAULTS, "submitted", "refused", "unknown")), happened
