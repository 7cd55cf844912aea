"""What Kubernetes says of a run, in words: from its RayJob, the pods of that, and Kueue."""

from collections.abc import Iterable

from clusters.base import ClusterStatus
from clusters.kueue import Answered, QueueView

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


def status_of(rayjob: Answered, pods: Iterable[Answered], queue: QueueView | None) -> ClusterStatus:
    """How the cluster sees the run of a RayJob; `pods` are those of its run, `queue` is what waits in Kueue's."""
    name = rayjob["metadata"]["name"]
    deployment = _deployment(rayjob)
    if not goes_on(rayjob):
        return _ended(rayjob)
    if deployment == "Running":
        since = rayjob["status"].get("jobStatusCheckFailureStartTime")
        silence = f": its head has not answered since {since}" if since else ""
        return ClusterStatus("running", f"RayJob {name}{silence}")
    if rayjob["spec"].get("suspend") or deployment in _SUSPENDED:
        if queue is None:
            return ClusterStatus("queued", f"RayJob {name} is suspended, and no queue is named that would admit it")
        return queue.status(name)
    if not deployment:
        return ClusterStatus("queued", f"RayJob {name}: KubeRay's operator has not taken it up yet")
    return _starting(rayjob, list(pods))


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


def _starting(rayjob: Answered, pods: list[Answered]) -> ClusterStatus:
    """The status of a run whose pods are not all there: queued where one has no node, else starting."""
    name = rayjob["metadata"]["name"]
    ray_cluster = rayjob["status"].get("rayClusterStatus") or {}
    obstacle = _why_no_pod(ray_cluster) or _why_no_node(name, pods) or _why_stuck(pods)
    if obstacle:
        return obstacle
    ready = sum(_is_ready(pod) for pod in pods)
    return ClusterStatus("starting", f"RayJob {name}: {ready} of {len(pods)} pods are ready")


def _why_no_pod(ray_cluster: Answered) -> ClusterStatus | None:
    """The status of a run for which KubeRay cannot make a pod; None where it can. A quota may be free later."""
    for condition in ray_cluster.get("conditions", []):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            words = str(condition.get("message") or condition.get("reason"))
            message = " ".join(words.split())
            reason = f"KubeRay cannot make a pod: {message[:300]}"
            if "exceeded quota" in message:
                return ClusterStatus("queued", reason)
            return ClusterStatus("starting", reason, stuck=True)
    return None


def _why_no_node(name: str, pods: list[Answered]) -> ClusterStatus | None:
    """The status of a run of which a pod has no node, in the scheduler's words; None where all have one."""
    for pod in pods:
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return ClusterStatus("queued", str(condition.get("message") or _NO_NODES))
    if pods and all(pod["spec"].get("nodeName") for pod in pods):
        return None
    return ClusterStatus("queued", f"RayJob {name}: {_NO_NODES}")


def _why_stuck(pods: list[Answered]) -> ClusterStatus | None:
    """The status of a run of which a container waits for somebody to fix something; None where none does."""
    for pod in pods:
        status = pod["status"]
        for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
            waiting = container.get("state", {}).get("waiting", {})
            reason = waiting.get("reason")
            if reason in _STUCK:
                words = f"{reason}: {waiting.get('message', '')}".rstrip(": ")
                return ClusterStatus("starting", f"pod {pod['metadata']['name']}: {words}", stuck=True)
    return None


def _is_ready(pod: Answered) -> bool:
    """Whether a pod has containers, and all of them are ready."""
    containers = pod["status"].get("containerStatuses", [])
    return bool(containers) and all(container.get("ready") for container in containers)
