"""What Kubernetes says of a run, in words: from its RayJob, the pods of that, and Kueue's workloads."""

from collections.abc import Iterable, Mapping
from typing import Any

from clusters.base import Capacity, ClusterStatus

Answered = Mapping[str, Any]  # an object as the API answers it

# Why a container waits that will not start before somebody fixes something.
_STUCK = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
)
_NO_NODES = "its pods have no nodes yet"
_SUSPENDED = ("Suspended", "Suspending")
_OVER = ("Complete", "Failed", "ValidationFailed")


def goes_on(rayjob: Answered) -> bool:
    """Whether a RayJob waits, starts or runs; by `jobDeploymentStatus` alone, as `jobStatus` is ahead of it."""
    is_removed = "deletionTimestamp" in rayjob["metadata"]
    return not is_removed and _deployment(rayjob) not in _OVER


def runs_now(rayjob: Answered) -> bool:
    """Whether the entrypoint of a RayJob has been handed to Ray."""
    return goes_on(rayjob) and _deployment(rayjob) == "Running"


def is_invalid(rayjob: Answered) -> bool:
    """Whether KubeRay refuses a RayJob for what it says."""
    return _deployment(rayjob) == "ValidationFailed"


def status_of(rayjob: Answered, pods: Iterable[Answered], workloads: Iterable[Answered]) -> ClusterStatus:
    """How the cluster sees the run of a RayJob; `pods` are those of its run, `workloads` all of the namespace."""
    name = rayjob["metadata"]["name"]
    deployment = _deployment(rayjob)
    if not goes_on(rayjob):
        return _ended(rayjob)
    if deployment == "Running":
        since = rayjob["status"].get("jobStatusCheckFailureStartTime")
        silence = f": its head has not answered since {since}" if since else ""
        return ClusterStatus("running", f"RayJob {name}{silence}")
    if rayjob["spec"].get("suspend") or deployment in _SUSPENDED:
        return ClusterStatus("queued", _why_suspended(name, workloads))
    if not deployment:
        return ClusterStatus("queued", f"RayJob {name}: KubeRay's operator has not taken it up yet")
    return _starting(name, list(pods))


def capacity_of_nodes(nodes: Iterable[Answered], pods: Iterable[Answered], gpu_resource: str) -> Capacity:
    """GPUs of nodes that take pods, or their cores where they have none; free is what these pods do not ask for."""
    open_nodes = [node for node in nodes if _takes_pods(node)]
    gpus = sum(_amount(node["status"]["allocatable"].get(gpu_resource, "0")) for node in open_nodes)
    resource = gpu_resource if gpus else "cpu"
    total = sum(_amount(node["status"]["allocatable"].get(resource, "0")) for node in open_nodes)
    used = 0.0
    for pod in pods:
        if pod["status"].get("phase") in ("Pending", "Running") and pod["spec"].get("nodeName"):
            for container in pod["spec"]["containers"]:
                requests = container.get("resources", {}).get("requests", {})
                used += _amount(requests.get(resource, "0"))
    return Capacity("gpu" if gpus else "cpu", int(total), max(0, int(total - used)))


def _deployment(rayjob: Answered) -> str:
    status = rayjob.get("status") or {}
    return str(status.get("jobDeploymentStatus") or "")


def _ended(rayjob: Answered) -> ClusterStatus:
    """The status of a run whose RayJob does nothing any more."""
    name = rayjob["metadata"]["name"]
    if "deletionTimestamp" in rayjob["metadata"]:
        return ClusterStatus("unknown", f"RayJob {name} is being removed; fleetune resume submits the run again")
    if _deployment(rayjob) == "Complete":
        return ClusterStatus("ended")
    status = rayjob["status"]
    message = " ".join(str(status.get("message") or "").split())
    words = ": ".join(filter(None, [status.get("reason"), message[:300]]))
    return ClusterStatus("unknown", f"RayJob {name} failed ({words}); fleetune resume submits it again")


def _why_suspended(name: str, workloads: Iterable[Answered]) -> str:
    """Why Kueue has not admitted a RayJob, in its words."""
    for workload in workloads:
        owners = workload["metadata"].get("ownerReferences", [])
        if any(owner["kind"] == "RayJob" and owner["name"] == name for owner in owners):
            conditions = (workload.get("status") or {}).get("conditions", [])
            for condition in conditions:
                if condition["type"] == "QuotaReserved" and condition["status"] == "False":
                    return f"Kueue: {condition['message']}"
    return "it waits for Kueue to admit it"


def _starting(name: str, pods: list[Answered]) -> ClusterStatus:
    """The status of a run whose pods are not all there: queued where one has no node, else starting."""
    for pod in pods:
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return ClusterStatus("queued", str(condition.get("message") or _NO_NODES))
    if not pods or not all(pod["spec"].get("nodeName") for pod in pods):
        return ClusterStatus("queued", f"RayJob {name}: {_NO_NODES}")
    ready = 0
    for pod in pods:
        containers = pod["status"].get("containerStatuses", [])
        for container in (*pod["status"].get("initContainerStatuses", []), *containers):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _STUCK:
                words = f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
                return ClusterStatus("starting", f"pod {pod['metadata']['name']}: {words}", stuck=True)
        ready += bool(containers) and all(container.get("ready") for container in containers)
    return ClusterStatus("starting", f"RayJob {name}: {ready} of {len(pods)} pods are ready")


def _takes_pods(node: Answered) -> bool:
    conditions = node["status"].get("conditions", [])
    is_ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return is_ready and not node["spec"].get("unschedulable")


def _amount(quantity: str) -> float:
    """Cores or devices of a quantity, like `4` or `3920m`."""
    if quantity.endswith("m"):
        return float(quantity[:-1]) / 1000
    return float(quantity)
