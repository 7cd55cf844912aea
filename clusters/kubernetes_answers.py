"""What Kubernetes says of a run, in words: from its RayJob, the pods of that, and Kueue.

What it says of a RayService is in kubernetes_services.py.
"""

from collections.abc import Iterable

from clusters.base import ClusterStatus
from clusters.kueue import Answered, QueueView
from k8s.planned import CLUSTER_LABEL, GANG_LABEL, QUEUE_LABEL

# Why a container waits that will not start before somebody fixes something.
_STUCK = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
)
_NO_NODES = "its pods have no nodes yet"
_NO_PODS = "KubeRay has made no pods of it yet"
_NO_GANG = "where it runs with scheduler-plugins it makes none of a RayJob: use `queue`, not `gang_scheduling`"
_KUEUE_GATE = "kueue.x-k8s.io/admission"
_NOT_FOUND = (126, 127)  # exit codes of a command that cannot be run
_SUSPENDED = ("Suspended", "Suspending")
_OVER = ("Complete", "Failed", "ValidationFailed")


def goes_on(rayjob: Answered) -> bool:
    """Whether a RayJob waits, starts or runs; by `jobDeploymentStatus` alone, as `jobStatus` is ahead of it."""
    if "deletionTimestamp" in rayjob["metadata"]:
        return False
    return _deployment(rayjob) not in _OVER


def runs_now(found: Answered) -> bool:
    """Whether all pods of a RayJob have been ready, and it is handed to Ray, or has been; or a RayService answers."""
    if not goes_on(found):
        return False
    if _deployment(found) == "Running":
        return True
    return serves(found)


def is_rayservice(found: Answered) -> bool:
    """Whether what carries a run is a RayService."""
    return bool(found["kind"] == "RayService")


def serves(found: Answered) -> bool:
    """Whether KubeRay says of a RayService that it takes requests."""
    status = found.get("status") or {}
    for condition in status.get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return True
    return False


def title_of(found: Answered) -> str:
    """What a RayJob or a RayService is called in a message."""
    name = found["metadata"]["name"]
    return f"{found['kind']} {name}"


def is_suspended(rayjob: Answered) -> bool:
    """Whether somebody, who is Kueue mostly, holds a RayJob back."""
    spec = rayjob["spec"]
    if spec.get("suspend"):
        return True
    return _deployment(rayjob) in _SUSPENDED


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
        trouble = silence or _why_not_there(_of_its_cluster(rayjob, pods))
        return ClusterStatus("running", f"RayJob {name}{trouble}")
    if is_suspended(rayjob):
        if queue is None:
            return ClusterStatus("queued", f"RayJob {name} is suspended, and no queue is named that would admit it")
        return queue.status(name)
    if not deployment:
        return ClusterStatus("queued", f"RayJob {name}: KubeRay's operator has not taken it up yet")
    labels = rayjob["metadata"].get("labels", {})
    never = f"; {_NO_GANG}" if GANG_LABEL in labels else ""
    ray_cluster = rayjob["status"].get("rayClusterStatus") or {}
    return starting_status(title_of(rayjob), ray_cluster, pods, never)


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


def starting_status(title: str, ray_cluster: Answered, pods: Iterable[Answered], never: str = "") -> ClusterStatus:
    """The status of a run whose pods are not all there: queued where one has no node, else starting.

    `title` is what carries it, `never` why there may be no pods for ever.
    """
    staying = _without_leaving(pods)
    no_pod = _why_no_pod(ray_cluster)
    if no_pod:
        return no_pod
    if not staying:
        return ClusterStatus("queued", f"{title}: {_NO_PODS}{never}")
    obstacle = _why_ended(staying) or _why_no_node(title, staying) or _why_stuck(staying)
    if obstacle:
        return obstacle
    ready = sum(_is_ready(pod) for pod in staying)
    waits = _init_container(staying)
    return ClusterStatus("starting", f"{title}: {ready} of {len(staying)} pods are ready{waits}")


def _without_leaving(pods: Iterable[Answered]) -> list[Answered]:
    """The pods that nobody has told to end."""
    staying = []
    for pod in pods:
        metadata = pod["metadata"]
        if "deletionTimestamp" not in metadata:
            staying.append(pod)
    return staying


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


def _why_no_node(title: str, pods: list[Answered]) -> ClusterStatus | None:
    """The status of a run of which a pod has no node, in the scheduler's words; None where all have one."""
    for pod in pods:
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return ClusterStatus("queued", str(condition.get("message") or _NO_NODES))
    if all(pod["spec"].get("nodeName") for pod in pods):
        return None
    return ClusterStatus("queued", f"{title}: {_NO_NODES}")


def _of_its_cluster(rayjob: Answered, pods: Iterable[Answered]) -> list[Answered]:
    """The pods of the cluster of Ray that a RayJob has now; those of the one before may end still."""
    name = rayjob["status"].get("rayClusterName")
    of_it = []
    for pod in pods:
        if pod["metadata"]["labels"].get(CLUSTER_LABEL) == name:
            of_it.append(pod)
    return of_it


def _why_not_there(pods: list[Answered]) -> str:
    """Which pod of a run that runs is not ready, and why, as it replaces one or is lost; empty where all are."""
    for pod in pods:
        pod_name = pod["metadata"]["name"]
        obstacle = why_not_started(pod)
        if "deletionTimestamp" in pod["metadata"]:
            obstacle = f"pod {pod_name} is to end, and KubeRay replaces it once it is gone"
        elif not obstacle and not _is_ready(pod):
            obstacle = f"pod {pod_name} is not ready, or its node is lost"
        if obstacle:
            return f": {obstacle}"
    return ""


def why_not_started(pod: Answered) -> str:
    """Why a pod does not start yet, in one line; empty where it has started."""
    pod_name = pod["metadata"]["name"]
    if is_held_by_kueue(pod):
        queue = pod["metadata"].get("labels", {}).get(QUEUE_LABEL)
        where = f"in queue {queue}" if queue else "and it has no queue"
        return f"Kueue holds pod {pod_name} back, {where}"
    for condition in pod["status"].get("conditions", []):
        is_without = condition["type"] == "PodScheduled" and condition["status"] == "False"
        if is_without:
            words = condition.get("message") or condition.get("reason")
            return f"pod {pod_name} has no node: {words}"
    if pod["status"].get("phase") != "Pending":
        return ""
    stuck = _why_stuck([pod])
    return stuck.reason if stuck else f"pod {pod_name} starts"


def is_held_by_kueue(pod: Answered) -> bool:
    """Whether a pod waits for Kueue, which may manage every pod of a namespace."""
    gates = pod["spec"].get("schedulingGates", [])
    names = [gate["name"] for gate in gates]
    return _KUEUE_GATE in names


def _why_ended(pods: list[Answered]) -> ClusterStatus | None:
    """The status of a run of which a pod has ended before all were there, in the words of who ended it."""
    for pod in pods:
        status = pod["status"]
        pod_name = pod["metadata"]["name"]
        for container in _containers(pod):
            state = container.get("state", {})
            before = container.get("lastState", {})
            ended = state.get("terminated") or before.get("terminated") or {}
            code = ended.get("exitCode", 0)
            if code:
                container_name = container.get("name")
                words = _words_of(ended)
                reason = f"pod {pod_name}: container {container_name} ended with exit code {code} ({words})"
                is_stuck = code in _NOT_FOUND
                return ClusterStatus("starting", reason, is_stuck)
        if status.get("phase") == "Failed":
            words = _words_of(status)
            reason = f"pod {pod_name} has failed ({words})"
            return ClusterStatus("starting", reason)
    return None


def _words_of(ended: Answered) -> str:
    """Why something is as it is, in one line: the reason, and the end of the message, where there are any."""
    reason = ended.get("reason")
    message = str(ended.get("message") or "")
    in_one_line = " ".join(message.split())
    parts = [reason, in_one_line[-300:]]
    words = filter(None, parts)
    return ": ".join(words) or "no reason given"


def _init_container(pods: list[Answered]) -> str:
    """Which pod is busy before its containers start, and with what; empty where none is."""
    for pod in pods:
        pod_name = pod["metadata"]["name"]
        status = pod["status"]
        for container in status.get("initContainerStatuses", []):
            state = container.get("state", {})
            container_name = container.get("name")
            if "running" in state:
                return f"; pod {pod_name} waits in its init container {container_name}"
    return ""


def _containers(pod: Answered) -> list[Answered]:
    """How the containers of a pod are, those first that run before the others."""
    status = pod["status"]
    first = status.get("initContainerStatuses", [])
    others = status.get("containerStatuses", [])
    return [*first, *others]


def _why_stuck(pods: list[Answered]) -> ClusterStatus | None:
    """The status of a run of which a container waits for somebody to fix something; None where none does."""
    for pod in pods:
        for container in _containers(pod):
            waiting = container.get("state", {}).get("waiting", {})
            reason = waiting.get("reason")
            if reason in _STUCK:
                words = f"{reason}: {waiting.get('message', '')}".rstrip(": ")
                return ClusterStatus("starting", f"pod {pod['metadata']['name']}: {words}", stuck=True)
    return None


def _is_ready(pod: Answered) -> bool:
    """Whether a pod has containers, and all of them are ready."""
    containers = pod["status"].get("containerStatuses", [])
    if not containers:
        return False
    return all(container.get("ready") for container in containers)
