"""What the server of these tests has beside runs: objects of built-in kinds, access reviews, and Kueue's queue.

Objects are applied as a server does it (server-side apply): each manager owns the fields that it has said, and what
it says no more goes. Here lists are one field each, and a Deployment whose pods would not be let in is refused.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from kubernetes_rules import plain_schema
from object_rules import Status
from pod_security import broken_rules
from pydantic import ValidationError

Stored = dict[str, Any]
Query = dict[str, str]
KINDS = {  # by plural
    "clusterrolebindings": "ClusterRoleBinding",
    "clusterroles": "ClusterRole",
    "deployments": "Deployment",
    "events": "Event",
    "namespaces": "Namespace",
    "networkpolicies": "NetworkPolicy",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "resourcequotas": "ResourceQuota",
    "rolebindings": "RoleBinding",
    "roles": "Role",
    "secrets": "Secret",
    "serviceaccounts": "ServiceAccount",
}
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
FIXED_OF_CLAIM = ("accessModes", "storageClassName", "volumeName")


def strict_problems(manifest: Stored) -> list[str]:
    """What strict validation finds in an object of a built-in kind: a line for each unknown or wrong field."""
    models = pytest.importorskip("kubernetes.client")
    try:
        getattr(models, f"V1{manifest['kind']}").model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return []


@dataclass
class GeneralObjects:
    """The objects by their paths, and whose fields they are."""

    stored: dict[str, Stored] = field(default_factory=dict)
    owned: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # by path and manager
    version: str = "1.36"
    without: set[str] = field(default_factory=set)  # of the fields of a RayJob: those of a later KubeRay
    pending: list[Stored] | None = None  # in Kueue's queue; None: it is not there
    groups: set[str] = field(default_factory=lambda: {"ray.io"})  # of APIs that are no built-in ones
    queues: set[str] = field(default_factory=lambda: {"team-a"})
    revision: int = 0

    def has(self, path: str) -> bool:
        """Whether requests to a path are for these objects."""
        known = ("/apis", "/version", "/openapi/v3/apis/ray.io/v1", REVIEWS)
        return path in known or path.startswith("/apis/visibility.") or _collection(path)[0] in KINDS

    def answer(self, cluster: Any, method: str, path: str, query: Query, body: Any, token: str) -> tuple[int, Any]:
        """The status and the body that a request gets; raises Status."""
        if path == "/version":
            major, minor = self.version.split(".")
            return 200, {"major": major, "minor": minor, "gitVersion": f"v{self.version}.2"}
        if path == "/apis":
            return 200, {"kind": "APIGroupList", "groups": [{"name": name} for name in sorted(self.groups)]}
        if path.startswith("/openapi"):
            return 200, self._openapi()
        if path == REVIEWS:
            return 201, _reviewed(body, cluster.tokens[token])
        if path.startswith("/apis/visibility."):
            return 200, self._pending(cluster, path, token)
        collection, name = _collection(path)
        group = path.split("/")[2] if path.startswith("/apis/") else ""
        verb = {"GET": "get" if name else "list", "POST": "create", "PATCH": "patch"}[method]
        cluster._authorize(token, verb, collection, group)
        match verb:
            case "list":
                return 200, {"kind": "List", "items": [*self._under(path)]}
            case "create":
                return 201, self._create(f"{path}/{body['metadata']['name']}", query, body)
            case "patch":
                return self._apply(path, query, body)
        if path not in self.stored:
            raise Status(404, "NotFound", f'{collection} "{name}" not found')
        return 200, self.stored[path]

    def _under(self, path: str) -> Iterator[Stored]:
        for place, stored in self.stored.items():
            if place.startswith(f"{path}/"):
                yield stored

    def _openapi(self) -> Stored:
        """The schema of a RayJob, as a server of this KubeRay has it."""
        schema = plain_schema()
        parts = {}
        for part in ("spec", "status"):
            properties = schema["properties"][part]["properties"].items()
            parts[part] = {"properties": {name: each for name, each in properties if name not in self.without}}
        kind = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
        found = {"properties": parts, "x-kubernetes-group-version-kind": [kind]}
        return {"components": {"schemas": {"io.ray.v1.RayJob": found}}}

    def _pending(self, cluster: Any, path: str, token: str) -> Stored:
        """What waits in a queue, as Kueue's own server says."""
        if self.pending is None:
            raise Status(404, "NotFound", "the server could not find the requested resource")
        cluster._authorize(token, "get", "localqueues/pendingworkloads", "visibility.kueue.x-k8s.io")
        queue = path.split("/")[-2]
        if queue not in self.queues:
            raise Status(404, "NotFound", f'localqueue.visibility.kueue.x-k8s.io "{queue}" not found')
        return {"kind": "PendingWorkloadsSummary", "items": [each for each in self.pending if each["queue"] == queue]}

    def _create(self, path: str, query: Query, body: Stored) -> Stored:
        if path in self.stored:
            kind, name = _collection(path)
            raise Status(409, "AlreadyExists", f'{kind} "{name}" already exists')
        return self._apply(path, query, body)[1]

    def _apply(self, path: str, query: Query, body: Stored) -> tuple[int, Stored]:
        """Have an object be as its manager says; raises Status for one that is not taken."""
        problems = strict_problems(body) if query.get("fieldValidation") == "Strict" else []
        if problems:
            raise Status(400, "BadRequest", f"strict decoding error: {problems[0]}")
        self._admit(path, body)
        before = self.stored.get(path)
        key = (path, query["fieldManager"])
        said = dict(_leaves(body))
        after = _without({}, before or {}, self.owned.get(key, set()) - said.keys())
        for place, value in said.items():
            _set(after, place, value)
        _refuse_changed_volume(before, after)
        if query.get("dryRun") == "All":
            return 200, after
        self.owned[key] = set(said)
        if before is None:
            after["metadata"]["uid"] = str(uuid.uuid4())
        managers = [manager for place, manager in self.owned if place == path]
        after["metadata"]["managedFields"] = [{"manager": manager} for manager in managers]
        if after != before:
            self.revision += 1
            after["metadata"]["resourceVersion"] = str(self.revision)
        self.stored[path] = after
        return 200 if before else 201, after

    def _admit(self, path: str, body: Stored) -> None:
        """Raise Status for a namespace that is not there, and for pods that it does not let in."""
        namespace, _, inside = path.partition("/namespaces/")[2].partition("/")
        if not inside:
            return
        stored = self.stored.get(f"/api/v1/namespaces/{namespace}")
        if stored is None:
            raise Status(404, "NotFound", f'namespaces "{namespace}" not found')
        level = stored["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if body["kind"] == "Deployment" and level == "restricted":
            broken = broken_rules(body["spec"]["template"]["spec"])
            if broken:
                raise Status(403, "Forbidden", f'violates PodSecurity "restricted:latest": {", ".join(broken)}')

    def rights(self, account: str) -> set[tuple[str, str]]:
        """What the roles that an account of the namespace is bound to let it do: verbs and resources."""
        allowed = set()
        for binding in [*self.stored.values()]:
            named = [subject["name"] for subject in binding.get("subjects", [])]
            if binding["kind"] in ("RoleBinding", "ClusterRoleBinding") and account in named:
                for rule in self._role(binding["roleRef"])["rules"]:
                    allowed |= {(verb, resource) for verb in rule["verbs"] for resource in rule["resources"]}
        return allowed

    def _role(self, reference: Stored) -> Stored:
        (role,) = [
            stored
            for stored in self.stored.values()
            if (stored["kind"], stored["metadata"]["name"]) == (reference["kind"], reference["name"])
        ]
        return role


def _collection(path: str) -> tuple[str, str]:
    """The plural in a path, and the name behind it; empty where there is none."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    plural, name = (*rest, "", "")[:2]
    return plural, name


def _reviewed(body: Stored, allowed: set[tuple[str, str]] | None) -> Stored:
    """The answer to the question whether one may."""
    wanted = body["spec"]["resourceAttributes"]
    resource = "/".join(filter(None, [wanted["resource"], wanted.get("subresource")]))
    may = allowed is None or (wanted["verb"], resource) in allowed
    return {**body, "status": {"allowed": may}}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of an object by their paths."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}\n{key}")
    else:
        yield path, value


def _without(into: Stored, value: Stored, gone: set[str]) -> Stored:
    """A copy of an object without some of its fields."""
    for path, leaf in _leaves(value):
        if path and path not in gone:
            _set(into, path, leaf)
    return into


def _set(into: Stored, path: str, value: Any) -> None:
    *parents, last = path.split("\n")[1:]
    for key in parents:
        into = into.setdefault(key, {})
    into[last] = value


def _refuse_changed_volume(before: Stored | None, after: Stored) -> None:
    """Raise Status for a volume of which something changes that may not."""
    if before is None or before["kind"] != "PersistentVolumeClaim":
        return
    name = before["metadata"]["name"]
    for part in FIXED_OF_CLAIM:
        if before["spec"].get(part) != after["spec"].get(part):
            words = "spec is immutable after creation except resources.requests and volumeAttributesClassName"
            raise Status(422, "Invalid", f'PersistentVolumeClaim "{name}" is invalid: spec: Forbidden: {words}')
