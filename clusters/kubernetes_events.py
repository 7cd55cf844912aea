"""Warnings of Kubernetes, which alone say why a pod is not made or does not start; they are kept an hour."""

from collections.abc import Iterable

from clusters.base import Unreachable
from clusters.kubernetes_api import ApiObject, KubernetesApi, Rejected
from clusters.kueue import Answered

_MOST = "500"  # of one answer, which is enough to have those of who waits
_LONGEST = 300  # characters that are shown


def warnings_in(api: KubernetesApi) -> tuple[list[ApiObject], str]:
    """The warnings of a namespace, by one request; and why there are none, where this account may not see them."""
    query = {"fieldSelector": "type=Warning", "limit": _MOST}
    path = f"/api/v1/namespaces/{api.namespace}/events"
    try:
        answer = api.request("GET", path, query, tries=1)
    except Rejected as rejected:
        return [], f"what events say is not known ({rejected.message})"
    except Unreachable:
        return [], ""  # the rest is known
    return answer["items"], ""


def newest_warning(events: Iterable[Answered], name: str) -> str:
    """The newest one about a RayJob of this name, its cluster or a pod of that, in one line; empty where none is."""
    newest = ""
    found = ""
    for event in events:
        about = event["involvedObject"]
        object_name = str(about.get("name"))
        made = event["metadata"].get("creationTimestamp")
        when = event.get("lastTimestamp") or event.get("eventTime") or made
        since = str(when)
        is_part = object_name.startswith(f"{name}-")
        is_about = is_part or object_name == name
        if is_about and since > newest:
            newest = since
            message = str(event.get("message", ""))
            words = " ".join(message.split())
            kind = about.get("kind")
            reason = event.get("reason")
            found = f"{kind} {object_name}: {reason}: {words[:_LONGEST]}"
    return found
