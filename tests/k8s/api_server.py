"""A small API server of Kubernetes with state, after what a real one answered, and with faults that a test chooses.

It has RayJobs and RayServices (ray.io/v1) with schema, pruning, strict validation, quota and access rules; pods,
nodes and workloads are there to be listed. It answers each request of `recorded_answers.json` as kube-apiserver 1.36
did.
"""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from exec_session import PROTOCOL, Session, accept_key
from general_objects import GeneralObjects
from kubernetes_rules import plain_schema
from object_rules import Status, admit, exceeded_quota, without_unknown

Stored = dict[str, Any]
Query = dict[str, str]
COLLECTIONS = {
    "/apis/ray.io/v1": ("rayjobs", "rayservices"),
    "/apis/kueue.x-k8s.io/v1beta1": ("workloads",),
    "/api/v1": ("pods",),
}
FAULTS = ("cut before", "cut after", "late", "500 before", "500 after", "429", "503")


class Cut(Exception):
    """The connection is to end without an answer."""


@dataclass
class Cluster:
    """The state of a cluster with one namespace, and what each token may do in it."""

    namespace: str = "fleetune"
    tokens: dict[str, set[tuple[str, str]] | None] = field(default_factory=lambda: {"admin": None})
    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)  # by collection and name
    nodes: list[Stored] = field(default_factory=list)
    quota: int | None = None
    created: list[str] = field(default_factory=list)  # names of all RayJobs that ever were
    requests: list[str] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)  # the bodies of requests
    accepted: list[tuple[str, str]] = field(default_factory=list)  # of requests, the path and what it takes
    fault: Callable[[str], str | None] = lambda _: None
    late: list[Callable[[], object]] = field(default_factory=list)  # writes that were cut off, and come yet
    expired: set[str] = field(default_factory=set)  # tokens of lists that are too old
    environment: dict[str, str] = field(default_factory=dict)  # of commands in pods
    sessions: list[Session] = field(default_factory=list)
    general: GeneralObjects = field(default_factory=GeneralObjects)
    version: int = 1
    lock: threading.RLock = field(default_factory=threading.RLock)

    def settle(self) -> None:
        """Let all writes come that were cut off."""
        with self.lock:
            while self.late:
                write = self.late.pop(0)
                write()

    def answer(self, method: str, path: str, query: Query, body: Any, token: str | None) -> tuple[int, Any]:
        """The status and the body that a request gets."""
        with self.lock:
            try:
                return self._answer(method, path, query, body, token)
            except Status as status:
                return status.code, status.dump()

    def _answer(self, method: str, path: str, query: Query, body: Any, token: str | None) -> tuple[int, Any]:
        if token not in self.tokens:
            raise Status(401, "Unauthorized", "Unauthorized")
        if path == "/api/v1/nodes":
            self._authorize(token, "list", "nodes", "")
            return 200, {"kind": "NodeList", "metadata": {}, "items": self.nodes}
        if self.general.has(path):
            return self.general.answer(self, method, path, query, body, token)
        before, _, rest = path.partition("/namespaces/")
        namespace, _, place = rest.partition("/")
        collection, _, name = place.partition("/")
        if collection not in COLLECTIONS.get(before, ()):
            return 404, "404 page not found\n"
        group = before.split("/")[2] if before.startswith("/apis/") else ""
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
        self._authorize(token, verb, collection, group)
        match verb:
            case "list":
                return 200, self._list(collection, query, namespace)
            case "create":
                return self._create(collection, namespace, query, body)
        stored = self.objects.get((collection, name))
        if stored is None or namespace != self.namespace:
            raise Status(404, "NotFound", f'{collection}.{group} "{name}" not found')
        if verb == "get":
            return 200, stored
        return self._delete(collection, name, stored, body)

    def _authorize(self, token: str, verb: str, collection: str, group: str) -> None:
        allowed = self.tokens[token]
        if allowed is None or (verb, collection) in allowed:
            return
        named = f"{collection}.{group}" if group else collection
        where = "" if collection == "nodes" else f' in the namespace "{self.namespace}"'
        words = f'User "{token}" cannot {verb} resource "{collection}" in API group "{group}"{where}'
        raise Status(403, "Forbidden", f"{named} is forbidden: {words}")

    def _list(self, collection: str, query: Query, namespace: str) -> Stored:
        """The objects of a namespace: of one that is not there, none, and that is no error."""
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
        phase = query.get("fieldSelector", "").removeprefix("status.phase=")
        items = [
            stored
            for (kind, _), stored in sorted(self.objects.items())
            if kind == collection and namespace == self.namespace
            if wanted.items() <= stored["metadata"].get("labels", {}).items()
            if not phase or stored["status"].get("phase") == phase
        ]
        token = query.get("continue")
        if token in self.expired:
            raise Status(410, "Expired", "The provided continue parameter is too old")
        start = int(token or 0)
        end = start + int(query.get("limit", len(items) or 1))
        metadata: Stored = {"resourceVersion": str(self.version)}
        if end < len(items):
            metadata["continue"] = str(end)
        return {"kind": "List", "metadata": metadata, "items": items[start:end]}

    def _create(self, collection: str, namespace: str, query: Query, body: Stored) -> tuple[int, Stored]:
        if namespace != self.namespace:
            raise Status(404, "NotFound", f'namespaces "{namespace}" not found')
        is_strict = query.get("fieldValidation") == "Strict"
        admit(body, is_strict)
        name = body["metadata"]["name"]
        if self.quota is not None and sum(kind == collection for kind, _ in self.objects) >= self.quota:
            raise exceeded_quota(collection, name, self.quota)
        if (collection, name) in self.objects:
            raise Status(409, "AlreadyExists", f'{collection}.ray.io "{name}" already exists')
        self.version += 1
        metadata = {
            **body["metadata"],
            "uid": str(uuid.uuid4()),
            "resourceVersion": str(self.version),
            "generation": 1,
            "creationTimestamp": "2026-11-22T02:50:53Z",
        }
        stored = {**without_unknown(body, plain_schema(body["kind"])), "metadata": metadata}
        if query.get("dryRun") != "All":
            self.objects[collection, name] = stored
            self.created.append(name)
        return 201, stored

    def _delete(self, collection: str, name: str, stored: Stored, body: Any) -> tuple[int, Stored]:
        uid = stored["metadata"]["uid"]
        wanted = ((body or {}).get("preconditions") or {}).get("uid", uid)
        if wanted != uid:
            differs = f"the UID in the precondition ({wanted}) does not match the UID in record ({uid})."
            words = f"{differs} The object might have been deleted and then recreated"
            raise Status(409, "Conflict", f'Operation cannot be fulfilled on RayJob.ray.io "{name}": {words}')
        if stored["metadata"].get("finalizers"):  # whoever has set them lets it go
            stored["metadata"] = {"deletionTimestamp": "2026-11-22T02:50:53Z", **stored["metadata"]}
            return 200, stored
        del self.objects[collection, name]
        return 200, {"kind": "Status", "status": "Success"}

    def remove(self, collection: str, name: str) -> None:
        """Have an object be deleted by somebody else."""
        with self.lock:
            self._delete(collection, name, self.objects[collection, name], None)


class Handler(BaseHTTPRequestHandler):
    """One request of a client; the cluster of its server answers, unless a fault comes between."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _serve(self, method: str) -> None:
        cluster: Cluster = self.server.cluster  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        cluster.sent.append(raw)
        body = json.loads(raw) if length else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        cluster.requests.append(f"{method} {self.path}")
        cluster.accepted.append((url.path, self.headers.get("Accept") or ""))
        if url.path.endswith("/exec"):
            self._execute(cluster, url.path.split("/")[-2], parse_qs(url.query)["command"], token)
            return

        def ask() -> tuple[int, Any]:
            return cluster.answer(method, url.path, query, body, token)

        try:
            code, answer = faulty(cluster, method, ask)
        except Cut:
            self.close_connection = True
            return
        with cluster.lock:  # an object of the cluster may change
            data = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data.encode())))
        if code == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data.encode())

    def _execute(self, cluster: Cluster, pod: str, command: list[str], token: str | None) -> None:
        """Run a command in a pod: here, in the environment of the cluster's pods."""
        allowed = cluster.tokens.get(token or "", set())
        is_allowed = allowed is None or {("get", "pods/exec"), ("create", "pods/exec")} <= allowed
        self.close_connection = True
        if not is_allowed or ("pods", pod) not in cluster.objects:
            may = {("get", "pods/exec"), ("create", "pods/exec")} - (allowed or set())
            self._refuse_session(token or "", pod, min(may)[0] if not is_allowed else "")
            return
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept_key(self.headers["Sec-WebSocket-Key"]))
        self.send_header("Sec-WebSocket-Protocol", PROTOCOL)
        self.end_headers()
        session = Session(command, cluster.environment, self.rfile, self.wfile)
        cluster.sessions.append(session)
        session.run()

    def _refuse_session(self, user: str, pod: str, verb: str) -> None:
        """Answer that there is no such pod, or what may not be done in it."""
        status = Status(404, "NotFound", f'pods "{pod}" not found')
        if verb:
            words = f'User "{user}" cannot {verb} resource "pods/exec" in API group "" in the namespace "fleetune"'
            status = Status(403, "Forbidden", f'pods "{pod}" is forbidden: {words}')
        data = json.dumps(status.dump()).encode()
        self.send_response(status.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def faulty(cluster: Cluster, method: str, ask: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
    """An answer as a fault leaves it; raises Cut for none."""
    fault = cluster.fault(method)
    match fault:
        case "cut before":
            raise Cut
        case "cut after":
            ask()
            raise Cut
        case "late":
            cluster.late.append(ask)
            raise Cut
        case "500 before":
            return 500, Status(500, "InternalError", "etcdserver: leader changed").dump()
        case "500 after":
            ask()
            return 504, Status(504, "Timeout", "request did not complete within the allotted timeout").dump()
        case "429":
            return 429, Status(429, "TooManyRequests", "the server has received too many requests").dump()
        case "503":
            return 503, "upstream connect error"
    return ask()


@contextmanager
def served(cluster: Cluster) -> Iterator[str]:
    """The address of a server of this cluster, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.cluster = cluster  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def write_kubeconfig(path: Path, address: str, token: str = "admin") -> None:
    """A kubeconfig by which a client reaches a server, with a context `test`."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.write_text(yaml.safe_dump(config))
