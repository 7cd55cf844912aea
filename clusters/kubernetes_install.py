"""Applying what a namespace has before its first run: server-side, so that a repetition changes nothing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clusters.kubernetes_api import JSON, KubernetesApi, Rejected

_MANAGER = "fleetune"  # by which the server knows whose fields are whose
_APPLY = {**JSON, "Content-Type": "application/apply-patch+yaml"}
_RESOURCES = {  # by kind: the plural in its path
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "Deployment": "deployments",
    "Namespace": "namespaces",
    "NetworkPolicy": "networkpolicies",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "ServiceAccount": "serviceaccounts",
}
_OF_SERVER = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid")

KubernetesObject = Mapping[str, Any]
Outcome = Literal["created", "changed", "unchanged", "left", "refused"]


@dataclass(frozen=True)
class Applied:
    """What became of an object: the fields that were changed, or why the server refused it."""

    kind: str
    place: str  # its name, behind that of its namespace
    outcome: Outcome
    detail: str = ""

    def __str__(self) -> str:
        """The line that people read."""
        line = f"{self.kind} {self.place}: {self.outcome}"
        if self.detail:
            line += f" ({self.detail})"
        return line


def place_of(manifest: KubernetesObject) -> str:
    """The name of an object, behind that of its namespace where it is in one."""
    metadata = manifest["metadata"]
    name: str = metadata["name"]
    namespace = metadata.get("namespace")
    if namespace:
        return f"{namespace}/{name}"
    return name


def path_of(manifest: KubernetesObject) -> str:
    """The path of an object in the API."""
    version = manifest["apiVersion"]
    metadata = manifest["metadata"]
    start = f"/apis/{version}" if "/" in version else f"/api/{version}"
    if "namespace" in metadata:
        start += f"/namespaces/{metadata['namespace']}"
    return f"{start}/{_RESOURCES[manifest['kind']]}/{metadata['name']}"


def apply_all(
    api: KubernetesApi,
    manifests: Iterable[KubernetesObject],
    storage: str | None,
    takes_over: bool = False,
) -> Iterator[Applied]:
    """Have objects be as these are, in order; of a volume that is there, the size stays unless `storage` is said.

    What others have made stays as it is, and that is told, unless it is to be taken over.
    What the server refuses is told, and the next one is applied. Raises Unreachable.
    """
    for manifest in manifests:
        try:
            yield _apply(api, manifest, storage, takes_over)
        except Rejected as rejected:
            yield Applied(manifest["kind"], place_of(manifest), "refused", rejected.message)


def _apply(
    api: KubernetesApi,
    manifest: KubernetesObject,
    storage: str | None,
    takes_over: bool,
) -> Applied:
    """Have one object be as the manifest is; raises Rejected."""
    path = path_of(manifest)
    before = _object_at(api, path)
    wanted = manifest
    if before and manifest["kind"] == "PersistentVolumeClaim":
        wanted = _with_fixed(manifest, before, storage)
    query = {"fieldManager": _MANAGER, "fieldValidation": "Strict", "force": "true"}
    kind = manifest["kind"]
    place = place_of(manifest)
    if before and not takes_over and not _is_ours(before):
        after = api.request("PATCH", path, {**query, "dryRun": "All"}, {**wanted}, _APPLY)
        changed = _changed_fields(before, after)
        if changed:
            fields = ", ".join(changed)
            return Applied(kind, place, "left", f"it is of others; --take-over would change {fields}")
        return Applied(kind, place, "unchanged")
    after = api.request("PATCH", path, query, {**wanted}, _APPLY)
    if before is None:
        return Applied(kind, place, "created")
    changed = _changed_fields(before, after)
    outcome: Outcome = "changed" if changed else "unchanged"
    return Applied(kind, place, outcome, ", ".join(changed))


def _is_ours(found: KubernetesObject) -> bool:
    """Whether an object that is there was applied by this before, as the server remembers."""
    fields = found["metadata"].get("managedFields", [])
    managers = [entry["manager"] for entry in fields]
    return _MANAGER in managers


def _object_at(api: KubernetesApi, path: str) -> KubernetesObject | None:
    """The object that is there; None where there is none. Raises Rejected."""
    try:
        return api.request("GET", path)
    except Rejected as rejected:
        if rejected.status != 404:
            raise
        return None


def _with_fixed(volume: KubernetesObject, before: KubernetesObject, storage: str | None) -> KubernetesObject:
    """A volume with what may not change of the one that is there, and its size and class unless others are said."""
    there = before["spec"]
    spec = {**volume["spec"], "accessModes": there["accessModes"]}
    if storage is None:
        spec["resources"] = {"requests": {"storage": there["resources"]["requests"]["storage"]}}
    if "storageClassName" in there:
        spec.setdefault("storageClassName", there["storageClassName"])
    return {**volume, "spec": spec}


def _changed_fields(before: Any, after: Any, path: str = "") -> list[str]:
    """The paths of fields that differ, but for those that the server keeps for itself."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return [] if before == after else [path]
    changed = []
    for key in dict.fromkeys((*before, *after)):
        inner = f"{path}.{key}".removeprefix(".")
        is_of_server = path == "metadata" and key in _OF_SERVER
        if is_of_server or inner == "status":
            continue
        changed += _changed_fields(before.get(key), after.get(key), inner)
    return changed
