"""What Kubernetes says of a run that serves, in words: from its RayService and the pods of that.

KubeRay makes a cluster of Ray as for a RayJob, hands it the application, and says in conditions whether it answers.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from clusters.base import ClusterStatus
from clusters.kubernetes_answers import goes_on, serves, starting_status, title_of
from clusters.kueue import Answered
from k8s.rayservice import PORT

_GIVEN_UP = ("ValidationFailed", "InitializingTimeout")  # reasons, behind which KubeRay does nothing more
_LONGEST_WORDS = 300  # characters of what an application says


def service_status(service: Answered, pods: Iterable[Answered]) -> ClusterStatus:
    """How the cluster sees the run of a RayService; `pods` are those of its run."""
    title = title_of(service)
    if not goes_on(service):
        return ClusterStatus("unknown", f"{title} is being removed; fleetune resume submits the run again")
    if serves(service):
        return ClusterStatus("running", title, address=service_address(service))
    status = service.get("status") or {}
    if not status:
        return ClusterStatus("queued", f"{title}: KubeRay's operator has not taken it up yet")
    return _why_given_up(title, status) or _why_not_deployed(title, status) or _without_answer(title, status, pods)


def service_address(service: Answered) -> str:
    """Where clients in the cluster reach a service: the Kubernetes Service that KubeRay makes for it."""
    metadata = service["metadata"]
    name = metadata["name"]
    namespace = metadata["namespace"]
    return f"http://{name}-serve-svc.{namespace}.svc:{PORT}"


def _why_given_up(title: str, status: Answered) -> ClusterStatus | None:
    """The status of a service that KubeRay has given up; None where it has not."""
    for condition in status.get("conditions", []):
        if condition["type"] == "Ready" and condition["reason"] in _GIVEN_UP:
            words = _end_of(condition["message"])
            return ClusterStatus("starting", f"{title}: {words}", stuck=True)
    return None


def _why_not_deployed(title: str, status: Answered) -> ClusterStatus | None:
    """The status of a service whose application cannot be started; None where it has not said so."""
    for application in _applications(status):
        if application["status"] == "DEPLOY_FAILED":
            words = _end_of(application.get("message", ""))
            return ClusterStatus("starting", f"{title}: its application does not start: {words}", stuck=True)
    return None


def _without_answer(title: str, status: Answered, pods: Iterable[Answered]) -> ClusterStatus:
    """The status of a service that will answer: what its pods wait for, and how its application stands."""
    ray_cluster: dict[str, Any] = {}
    for cluster in _clusters(status):
        ray_cluster = cluster.get("rayClusterStatus") or ray_cluster
    found = starting_status(title, ray_cluster, pods)
    states = {application["status"] for application in _applications(status)}
    if states and found.state == "starting" and not found.stuck:
        in_order = sorted(states)
        words = ", ".join(in_order)
        return ClusterStatus("starting", f"{found.reason}; its application is {words}")
    return found


def _clusters(status: Answered) -> Iterator[dict[str, Any]]:
    """What is said of the cluster of Ray that answers, and of the one that is to follow it."""
    yield status.get("activeServiceStatus") or {}
    yield status.get("pendingServiceStatus") or {}


def _applications(status: Answered) -> Iterator[dict[str, Any]]:
    """What is said of the application, on each of the clusters."""
    for cluster in _clusters(status):
        yield from (cluster.get("applicationStatuses") or {}).values()


def _end_of(text: str) -> str:
    """The end of a text, which says most of a traceback, in one line."""
    in_one_line = " ".join(text.split())
    return in_one_line[-_LONGEST_WORDS:]
