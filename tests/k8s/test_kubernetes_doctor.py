"""`fleetune doctor --cluster k8s`: what is wrong with a cluster, and the command that mends it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Cluster
from small_cluster import NODE

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters import kubernetes_api, kubernetes_namespace
from clusters.checks import Check
from orchestrator.cluster_doctor import cluster_checks
from orchestrator.terminal import render

CLAIM = "/api/v1/namespaces/fleetune/persistentvolumeclaims/fleetune"
QUOTA = "/api/v1/namespaces/fleetune/resourcequotas/fleetune"
SECRETS = "/api/v1/namespaces/fleetune/secrets"
ALL = (
    *("server", "operator", "permissions", "nodes", "volume", "secrets", "image", "reader", "packages", "quota"),
    *("keeper", "queue", "trial"),
)


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries, and a pod resolves the names of this machine."""
    monkeypatch.setattr(kubernetes_namespace, "_SERVER", "localhost")
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)


@pytest.fixture
def change(laptop: Path, tmp_path: Path) -> Callable[..., None]:
    """Changes what the clusters file says of the cluster."""
    assert laptop.exists()

    def change(**changes: Any) -> None:
        file = tmp_path / "clusters.yaml"
        clusters = yaml.safe_load(file.read_text())
        clusters["k8s"] |= changes
        file.write_text(yaml.safe_dump(clusters))

    return change


def look() -> dict[str, Check]:
    return {check.name: check for check in cluster_checks("k8s", test_job=False)}


def test_all_is_well(change: Callable[..., None], cluster: Cluster) -> None:
    change(queue="team-a")
    cluster.general.pending = []
    checks = look()
    assert {name: check.level for name, check in checks.items()} == dict.fromkeys(ALL, "ok")
    found = {name: check.found for name, check in checks.items()}
    assert found["server"].startswith("v1.36.2; the client here, ")
    assert found["operator"] == "RayJob of KubeRay 1.7 or newer"
    assert found["permissions"] == "all 17 that are used"
    assert found["nodes"] == "8 of nvidia.com/gpu, 8 not asked for here; 1 of 1 nodes fit"
    assert found["volume"] == "fleetune has 2Ti (class nfs, ReadWriteMany)"
    assert found["secrets"] == "pods are to have none"
    assert found["image"] == "registry.example.org/team/fleetune, sha256 000000000000..."
    assert found["reader"].startswith("pod reader-1 has 0 runs in ")
    assert (
        "can be written; names: localhost is resolved; ray: " in found["packages"]
        and "deepspeed" in found["packages"]
    )
    assert found["quota"] == "none" and found["queue"] == "0 wait in team-a"
    assert cluster.created == []


@pytest.mark.parametrize(
    ("group", "level", "found"),
    [
        ("scheduling.volcano.sh", "ok", "Volcano is here"),
        ("scheduling.x-k8s.io", "fail", "scheduler-plugins is here"),
        ("batch", "warn", "no Volcano is here; YuniKorn would need labels"),
    ],
)
def test_a_batch_scheduler_with_which_no_run_starts_is_named(
    group: str, level: str, found: str, change: Callable[..., None], cluster: Cluster
) -> None:
    stop_reader(cluster)
    change(gang_scheduling=True)
    cluster.general.groups.add(group)
    check = look()["gang"]
    assert check.level == level and check.found.startswith(found)
    assert ("queue" in check.mend) == (level != "ok")


@pytest.mark.usefixtures("laptop")
def test_a_pod_that_cannot_resolve_names_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_namespace, "_SERVER", "no-such-name.invalid")
    check = look()["names"]
    assert (check.name, check.level) == ("names", "fail") and "no-such-name.invalid" in check.found
    assert check.mend.startswith("fleetune k8s install --cluster k8s")


@pytest.mark.usefixtures("laptop")
def test_an_image_whose_path_has_no_ray_is_told_of(cluster: Cluster) -> None:
    cluster.environment["PATH"] = "/usr/bin:/bin"
    check = look()["ray"]
    assert check.level == "fail" and "no `ray` is on the PATH" in check.found


def stop_reader(cluster: Cluster) -> None:
    """Have no command run in the reader's pod, which takes time."""
    cluster.objects["pods", "reader-1"]["status"]["containerStatuses"][0]["ready"] = False


def node(**changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(NODE)
    for part, value in changes.items():
        changed[part] |= value
    return changed


def without_gpus(cluster: Cluster) -> None:
    cluster.nodes = [node(status={"allocatable": {"cpu": "4"}})]


def of_nodes_unseen(cluster: Cluster) -> None:
    (cluster.tokens["client"] or set()).remove(("list", "nodes"))


def tainted(cluster: Cluster) -> None:
    cluster.nodes = [node(spec={"taints": [{"key": "gpu", "value": "a", "effect": "NoSchedule"}]})]


def unbound(cluster: Cluster) -> None:
    cluster.general.stored[CLAIM]["status"] = {"phase": "Pending"}


def for_one_node(cluster: Cluster) -> None:
    cluster.general.stored[CLAIM]["spec"]["accessModes"] = ["ReadWriteOnce"]


def without_claim(cluster: Cluster) -> None:
    del cluster.general.stored[CLAIM]


def used_up(cluster: Cluster) -> None:
    status = {"hard": {"requests.nvidia.com/gpu": "8"}, "used": {"requests.nvidia.com/gpu": "8"}}
    cluster.general.stored[QUOTA] = {"kind": "ResourceQuota", "metadata": {"name": "fleetune"}, "status": status}


def without_image(cluster: Cluster) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "401 Unauthorized"}
    statuses = [{"ready": False, "state": {"waiting": waiting}}]
    cluster.objects["pods", "reader-1"]["status"] = {"phase": "Pending", "containerStatuses": statuses}


def with_reader_that_waits(cluster: Cluster) -> None:
    cluster.objects["pods", "reader-1"]["status"] = {"phase": "Pending"}


def with_reader_held_back(cluster: Cluster) -> None:
    """As Kueue does with every pod of a namespace that has a default queue: it gates those of Deployments, too."""
    with_reader_that_waits(cluster)
    pod = cluster.objects["pods", "reader-1"]
    pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "default"
    pod["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/admission"}]


def with_keeper_held_back(cluster: Cluster) -> None:
    """And it suspends the Jobs of the keeper's CronJob."""
    for number, status in ((1, "True"), (2, "False")):
        condition = {"type": "Admitted", "status": status, "reason": "Pending", "message": "no quota"}
        owner = {"kind": "Job", "name": f"fleetune-keeper-{number}"}
        workload = {"metadata": {"ownerReferences": [owner]}, "status": {"conditions": [condition]}}
        cluster.objects["workloads", f"job-{number}"] = workload


def with_older_image(cluster: Cluster) -> None:
    cluster.objects["pods", "reader-1"]["spec"]["containers"][0]["image"] = "older"


def without_reader(cluster: Cluster) -> None:
    del cluster.objects["pods", "reader-1"]


def without_kuberay(cluster: Cluster) -> None:
    cluster.general.without = {"preRunningDeadlineSeconds"}


def with_kuberay_1_6(cluster: Cluster) -> None:
    cluster.general.without = {"jobStatusCheckFailureStartTime"}


def of_old_server(cluster: Cluster) -> None:
    cluster.general.version = "1.28"


def of_new_server(cluster: Cluster) -> None:
    cluster.general.version = "1.44"


def who_sees_secrets(cluster: Cluster) -> None:
    cluster.tokens["client"] = {*(cluster.tokens["client"] or ()), ("get", "secrets")}


def with_full_quota(cluster: Cluster) -> None:
    cluster.quota = 0


@pytest.mark.parametrize(
    ("breaks", "name", "level", "found", "mend"),
    [
        (of_old_server, "server", "fail", "v1.28.2; ", "upgrade the cluster to 1.30 or newer"),
        (of_new_server, "server", "warn", "v1.44.2; ", "pip install --upgrade 'fleetune[k8s]'"),
        (without_kuberay, "operator", "fail", "older than 1.6", "kubectl apply --server-side -k "),
        (with_kuberay_1_6, "operator", "warn", "KubeRay 1.6", "kubectl apply --server-side -k "),
        (without_gpus, "nodes", "warn", "no node has nvidia.com/gpu", "device plugin"),
        (of_nodes_unseen, "nodes", "warn", "this account may not see them", "create clusterrolebinding NAME"),
        (tainted, "nodes", "fail", "gpu-1 has the taint gpu=a:NoSchedule", "tolerations"),
        (unbound, "volume", "fail", "fleetune is Pending, not bound", "kubectl -n fleetune describe pvc fleetune"),
        (for_one_node, "volume", "fail", "is for one node alone (class nfs, ReadWriteOnce)", "--storage-class"),
        (
            without_claim,
            "volume",
            "fail",
            "there is no PersistentVolumeClaim fleetune",
            "fleetune k8s install --cluster k8s --storage",
        ),
        (used_up, "quota", "warn", "requests.nvidia.com/gpu 8 of 8", "kubectl -n fleetune describe quota"),
        (without_image, "image", "fail", "ImagePullBackOff: 401 Unauthorized", "image_pull_secrets (none is named)"),
        (with_reader_that_waits, "image", "warn", "pod reader-1 has not pulled it yet", "describe pod reader-1"),
        (with_older_image, "image", "warn", "the reader has another one", "fleetune k8s install --cluster k8s"),
        (
            with_reader_that_waits,
            "reader",
            "fail",
            "no pod of the reader is ready: pod reader-1",
            "describe pod reader-1",
        ),
        (without_image, "reader", "fail", "pod reader-1: ImagePullBackOff: 401", "describe pod reader-1"),
        (without_reader, "reader", "fail", "there is no pod of the reader", "fleetune k8s install --cluster k8s"),
        (with_reader_held_back, "reader", "fail", "holds pod reader-1 back, in queue default", "`reader_queue`"),
        (with_reader_held_back, "image", "warn", "has not pulled it yet", "`reader_queue`"),
        (with_keeper_held_back, "keeper", "warn", "Job fleetune-keeper-2 back (no quota)", "`reader_queue`"),
        (with_full_quota, "trial", "fail", "exceeded quota", "mend what is above"),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
@pytest.mark.usefixtures("laptop")
def test_what_is_wrong_is_named_with_what_mends_it(
    breaks: Callable[[Cluster], None], name: str, level: str, found: str, mend: str, cluster: Cluster
) -> None:
    stop_reader(cluster)
    breaks(cluster)
    checks = look()
    check = checks[name]
    assert check.level == level and found in check.found and mend in check.mend, check


@pytest.mark.usefixtures("laptop")
def test_secrets_that_are_there_are_looked_for_without_their_values(
    change: Callable[..., None], cluster: Cluster
) -> None:
    stop_reader(cluster)
    who_sees_secrets(cluster)
    cluster.general.stored[f"{SECRETS}/ghcr"] = {"kind": "Secret", "metadata": {"name": "ghcr"}}
    change(image_pull_secrets=["ghcr"], secrets={"HF_TOKEN": "hf/token"})
    check = look()["secrets"]
    assert (check.level, check.found) == ("fail", "there is no Secret hf")
    assert check.mend == "kubectl -n fleetune create secret generic hf --from-file=KEY=FILE"
    cluster.general.stored[f"{SECRETS}/hf"] = {"kind": "Secret", "metadata": {"name": "hf"}}
    assert look()["secrets"].found == "ghcr, hf"
    assert {accept for path, accept in cluster.accepted if "/secrets/" in path} == {
        "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
    }


@pytest.mark.usefixtures("laptop")
def test_a_server_that_is_away_is_all_that_is_said(cluster: Cluster) -> None:
    cluster.fault = lambda _: "cut before"
    (check,) = cluster_checks("k8s", test_job=False)
    assert (check.name, check.level) == ("server", "fail") and "kubectl cluster-info" in check.mend


@pytest.mark.usefixtures("laptop")
def test_it_fits_80_columns(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_reader(cluster)
    for breaks in (without_claim, with_kuberay_1_6, without_reader, used_up, with_full_quota):
        breaks(cluster)
    monkeypatch.setattr(render, "_WIDE", 80)
    render.show_checks(cluster_checks("k8s", test_job=False))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("fleetune k8s install --cluster k8s" in line for line in lines)
