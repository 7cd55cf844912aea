"""What Kueue says of runs that wait for it: why it has not admitted them, and their places in its queue."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from clusters.base import ClusterStatus, Unreachable
from clusters.kubernetes_api import KubernetesApi, Rejected

_VERSIONS = ("v1beta1", "v1beta2")  # of its API: older ones have the first alone, and newer ones both
_GROUP = "kueue.x-k8s.io"

Answered = Mapping[str, Any]  # an object as the API answers it


@dataclass(frozen=True)
class QueueView:
    """What waits in a queue: workloads and places by the name of their RayJob; `trouble` says why they lack."""

    queue: str
    workloads: Mapping[str, Answered] = field(default_factory=dict)
    places: Mapping[str, Answered] = field(default_factory=dict)
    waiting: int = 0
    trouble: str = ""

    def status(self, name: str) -> ClusterStatus:
        """Why a RayJob of this name is not admitted; stuck where that is for somebody to fix."""
        words = []
        if name in self.places:
            words.append(self._place(name))
        is_stuck = False
        if name in self.workloads:
            reason, is_stuck = _pending_reason(self.workloads[name])
            if reason:
                words.append(reason)
        if not words:
            words.append(f"it waits for queue {self.queue} to admit it")
        if self.trouble:
            words.append(self.trouble)
        text = "; ".join(words)
        return ClusterStatus("queued", f"Kueue: {text}", is_stuck)

    def _place(self, name: str) -> str:
        """The place of a RayJob in the queue, as people count."""
        found = self.places[name]
        here = found["positionInLocalQueue"] + 1
        among_all = found["positionInClusterQueue"] + 1
        words = f"place {here} of {self.waiting} in queue {self.queue}, place {among_all} in its cluster queue"
        priority = found.get("priority")
        if priority:
            words += f", priority {priority}"
        return words


def look_at_queue(api: KubernetesApi, queue: str) -> QueueView:
    """How the workloads of a namespace stand; where Kueue may not be asked, that is said. Raises Unreachable."""
    namespace = f"namespaces/{api.namespace}"
    workloads, refused = _items(api, f"/apis/{_GROUP}", f"{namespace}/workloads")
    troubles = []
    if refused:
        troubles.append(f"why is not known ({refused.message})")
    places: list[Answered] = []
    with suppress(Unreachable):  # Kueue's own server, which may be away
        visibility = f"/apis/visibility.{_GROUP}"
        pending = f"{namespace}/localqueues/{queue}/pendingworkloads"
        places, refused = _items(api, visibility, pending, tries=1)
        is_told = refused and (refused.status == 403 or queue in refused.message)
        if refused and is_told:
            troubles.append(f"its place is not known ({refused.message})")
    trouble = "; ".join(troubles)
    workloads_by_name = _by_rayjob(workloads)
    places_by_name = _by_rayjob(places)
    return QueueView(queue, workloads_by_name, places_by_name, len(places), trouble)


def held_back(api: KubernetesApi, prefix: str) -> dict[str, str]:
    """Why Kueue has not admitted what has names with a prefix, and is no RayJob, by these. Raises Unreachable.

    Where a namespace has a default queue, or all of its pods are managed, that is every pod and Job. Nothing where
    Kueue is not there, or may not be asked.
    """
    held = {}
    workloads, _ = _items(api, f"/apis/{_GROUP}", f"namespaces/{api.namespace}/workloads")
    for workload in workloads:
        for owner in workload["metadata"].get("ownerReferences", []):
            is_meant = owner["kind"] != "RayJob" and owner["name"].startswith(prefix)
            if is_meant and not _has_been_admitted(workload):
                reason, _ = _pending_reason(workload)
                held[owner["name"]] = reason or "it waits to be admitted"
    return held


def _has_been_admitted(workload: Answered) -> bool:
    """Whether a workload may run, or has."""
    status = workload.get("status") or {}
    for condition in status.get("conditions", []):
        if condition["type"] in ("Admitted", "Finished") and condition["status"] == "True":
            return True
    return False


def _items(api: KubernetesApi, group: str, path: str, **options: Any) -> tuple[list[Answered], Rejected | None]:
    """A list of Kueue's in the first version of its API that there is, or the refusal where it may not be asked.

    Raises Unreachable.
    """
    refused = None
    for version in _VERSIONS:
        try:
            answer = api.request("GET", f"{group}/{version}/{path}", **options)
        except Rejected as rejected:
            if rejected.status not in (403, 404):
                raise
            refused = rejected
            if rejected.status == 403:
                break
        else:
            return answer["items"], None
    return [], refused


def _by_rayjob(items: Iterable[Answered]) -> dict[str, Answered]:
    """Workloads by the names of the RayJobs that own them."""
    found = {}
    for item in items:
        metadata = item["metadata"]
        owners = metadata.get("ownerReferences", [])
        for owner in owners:
            if owner["kind"] == "RayJob":
                name = owner["name"]
                found[name] = item
    return found


def _pending_reason(workload: Answered) -> tuple[str, bool]:
    """Why a workload is not admitted, in Kueue's words, and whether somebody has to fix that."""
    if workload.get("spec", {}).get("active") is False:
        return "its workload was deactivated (spec.active is false)", True
    words = []
    is_stuck = False
    conditions = {}
    status = workload.get("status") or {}
    for condition in status.get("conditions", []):
        conditions[condition["type"]] = condition
    evicted = conditions.get("Evicted", {})
    if evicted.get("status") == "True":
        reason = evicted.get("reason") or "no reason given"
        words.append(f"it was evicted ({reason})")
    for name in ("QuotaReserved", "Admitted"):
        condition = conditions.get(name, {})
        message = condition.get("message")
        if condition.get("status") == "False" and message:
            in_one_line = " ".join(message.split())
            words.append(in_one_line)
            is_stuck = condition.get("reason") == "Inadmissible"
            break
    return "; ".join(words), is_stuck
