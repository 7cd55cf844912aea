"""What a client of a namespace must be allowed to do there, and what of that it is not."""

from collections.abc import Iterable
from dataclasses import dataclass

from clusters.kubernetes_api import KubernetesApi

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_KUEUE = "kueue.x-k8s.io"


@dataclass(frozen=True)
class Permission:
    """A verb on the objects of a resource: of the namespace, but for nodes. `what_for` says who needs it."""

    verb: str
    resource: str
    what_for: str
    group: str = ""

    def __str__(self) -> str:
        """As the server names it when it refuses."""
        text = f"{self.verb} {self.resource}"
        if self.group:
            text += f".{self.group}"
        return text


# The role of k8s/manifests/base/access.yaml has these and no other ones.
NEEDED = (
    Permission("create", "rayjobs", "submit", "ray.io"),
    Permission("get", "rayjobs", "submit", "ray.io"),
    Permission("list", "rayjobs", "status", "ray.io"),
    Permission("delete", "rayjobs", "cancel", "ray.io"),
    Permission("create", "rayservices", "serve", "ray.io"),
    Permission("get", "rayservices", "serve", "ray.io"),
    Permission("list", "rayservices", "status", "ray.io"),
    Permission("delete", "rayservices", "cancel", "ray.io"),
    Permission("list", "pods", "status"),
    Permission("get", "pods/exec", "run folders"),
    Permission("create", "pods/exec", "run folders"),
    Permission("get", "persistentvolumeclaims", "doctor"),
    Permission("list", "resourcequotas", "doctor"),
)
# What runs go on without, in fewer words.
WISHED = (
    Permission("list", "events", "why a run does not start"),
    Permission("list", "nodes", "whether a job fits"),
)
NEEDED_WITH_QUEUE = (
    Permission("list", "workloads", "status", _KUEUE),
    Permission("get", "localqueues/pendingworkloads", "status", f"visibility.{_KUEUE}"),
)


def denied(api: KubernetesApi, permissions: Iterable[Permission]) -> list[Permission]:
    """Those that this account has not, by what the server says of each."""
    lacking = []
    for permission in permissions:
        if not is_allowed(api, permission):
            lacking.append(permission)
    return lacking


def is_allowed(api: KubernetesApi, permission: Permission) -> bool:
    """Whether the server would let this account do it in the namespace; it does nothing."""
    resource, _, subresource = permission.resource.partition("/")
    wanted = {"verb": permission.verb, "group": permission.group, "resource": resource, "subresource": subresource}
    if resource != "nodes":
        wanted["namespace"] = api.namespace
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": wanted},
    }
    return bool(api.request("POST", _REVIEWS, body=review)["status"]["allowed"])
