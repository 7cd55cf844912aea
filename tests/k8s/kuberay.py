"""What KubeRay's operator 1.7 does with RayJobs in HTTPMode, as its source says, and with real Ray in the pods.

A RayService gets a cluster of Ray, too, which is handed its applications by the dashboard's REST API.

A RayJob gets a cluster of Ray, whose pods are made again when they are lost. Once all are ready its entrypoint is
handed to Ray's dashboard, which is asked from then on what became of it. A job that failed is tried with a new
cluster, up to `backoffLimit` times.
"""

import copy
import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_urlsafe
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from api_server import Cluster, Stored
from kubelet import Kubelet, Pod, environment_of, image_environment
from ports import free_port

_TICK_S = 0.1
_STATUS_CHECK_TIMEOUT_S = 300.0  # RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS
_DASHBOARD_S = 5.0
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_FLAGS = ("disable-usage-stats",)  # options of `ray start` without a value
_HOST = "127.0.0.1"


@dataclass
class RayCluster:
    """A cluster of Ray: its name, its spec, and the ports of the service that its head is behind."""

    name: str
    spec: Stored
    job_id: str
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    count: int = 0  # of pods that were ever made
    token: str = field(default_factory=token_urlsafe)  # which its Secret has
    serves_at: int = field(default_factory=free_port)  # for port 8000 of pods with a network of their own

    def pods(self, kubelet: Kubelet) -> list[Pod]:
        """Its pods."""
        return [
            pod
            for pod in kubelet.pods.values()
            if pod.stored["metadata"]["labels"].get("ray.io/cluster") == self.name
        ]

    def reconcile(self, kubelet: Kubelet) -> bool:
        """Replace the pods that are not there; gives whether all are there and ready.

        One that was told to end is there until it is gone, which on a lost node is never.
        """
        for pod in self.pods(kubelet):
            if pod.is_over and not pod.is_leaving:
                kubelet.delete(pod.name)
        (workers,) = self.spec["workerGroupSpecs"]
        wanted = {"head": 1, "worker": workers["replicas"]}
        for kind, number in wanted.items():
            group = self.spec["headGroupSpec"] if kind == "head" else workers
            there = [pod for pod in self.pods(kubelet) if _kind(pod) == kind]
            for _ in range(number - len(there)):
                self.count += 1
                kubelet.create(self._pod(kind, group, kubelet.new_folder()))
        ready = [pod for pod in self.pods(kubelet) if pod.is_ready and not pod.is_leaving]
        return len(ready) == sum(wanted.values())

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """What the dashboard answers; raises OSError, which is an HTTPError where it says no."""
        request = Request(f"http://{_HOST}:{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        if method is not None:
            request.method = method
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=_DASHBOARD_S) as answer:
            data = answer.read()
            return json.loads(data) if data else None

    def _pod(self, kind: str, group: Stored, folder: Path) -> Pod:
        template = copy.deepcopy(group["template"])
        labels = {**template["metadata"]["labels"], "ray.io/cluster": self.name, "ray.io/node-type": kind}
        metadata = {"name": f"{self.name}-{kind}-{self.count}", "labels": labels}
        stored = {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}
        pod = Pod(stored, [], {}, [], folder)
        agent = free_port()
        health = f"http://{_HOST}:{agent}/api/local_raylet_healthz"
        pod.probes = [health, f"http://{_HOST}:{self.dashboard}/api/gcs_healthz"] if kind == "head" else [health]
        pod.command = self._command(kind, {**group["rayStartParams"], "dashboard-agent-listen-port": agent}, pod)
        given = image_environment(pod.folder) | self._variables(kind)
        pod.environment = environment_of(pod.stored, given)
        if kind == "worker":
            pod.may_start = self._has_head
        return pod

    def _command(self, kind: str, params: Mapping[str, Any], pod: Pod) -> list[str]:
        """How Ray is started; and what stands for the pod's own network and /tmp."""
        own = {"node-ip-address": _HOST, "temp-dir": pod.folder, "min-worker-port": 0, "max-worker-port": 0}
        own["metrics-export-port"] = free_port()
        flags = ["--block"]
        if kind == "head":
            flags.append("--head")
            own |= {"port": self.gcs, "dashboard-port": self.dashboard, "ray-client-server-port": free_port()}
        else:
            own["address"] = f"{_HOST}:{self.gcs}"
        options = []
        for name, value in {**params, **own}.items():
            options.append(f"--{name}" if name in _FLAGS else f"--{name}={value}")
        ray = shutil.which("ray", path=image_environment(pod.folder)["PATH"])
        assert ray
        return [ray, "start", *flags, *options]

    def _variables(self, kind: str) -> dict[str, str]:
        return {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_NODE_TYPE_NAME": "headgroup" if kind == "head" else "workers",
            "RAY_ADDRESS": f"{_HOST}:{self.gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def _has_head(self) -> bool:
        with suppress(OSError), socket.create_connection((_HOST, self.gcs), timeout=1):
            return True
        return False


class KubeRay:
    """The operator, with the kubelet beside it: one thread, which takes everything a step further again and again."""

    def __init__(self, cluster: Cluster, kubelet: Kubelet, time_scale: float = 1.0) -> None:
        self.cluster = cluster
        self.kubelet = kubelet
        self.ray_clusters: dict[str, RayCluster] = {}
        self.is_up = True
        self.admits = True  # whether Kueue lets RayJobs go that have a queue
        self.gives_up_s = _STATUS_CHECK_TIMEOUT_S
        self._time_scale = time_scale  # of the time that a finished cluster stays
        self._ended: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._done = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End everything."""
        self._done.set()
        self._thread.join()
        self.kubelet.close()

    def _run(self) -> None:
        while not self._done.wait(_TICK_S):
            try:
                self.kubelet.tick()
                if self.is_up:
                    self._tick()
            except Exception as error:
                self.error = error
                raise

    def _tick(self) -> None:
        with self.cluster.lock:
            rayjobs = [stored for (kind, _), stored in self.cluster.objects.items() if kind == "rayjobs"]
            services = [stored for (kind, _), stored in self.cluster.objects.items() if kind == "rayservices"]
        used = set()
        for service in services:
            self._keep_service(service)
            used.add(cluster_of_service(service))
        for rayjob in rayjobs:
            self._reconcile(rayjob)
            used.add(rayjob["status"].get("rayClusterName"))
        for name in self.ray_clusters.keys() - used:  # which their RayJobs have owned
            self._delete(name)

    def _finalize(self, rayjob: Stored) -> None:
        """Stop the job of a RayJob that was deleted, and let go of it, whatever came of that."""
        cluster = self.ray_clusters.get(rayjob["status"].get("rayClusterName", ""))
        if cluster:
            with suppress(OSError):
                cluster.ask(f"/api/jobs/{cluster.job_id}/stop", {})
        with self.cluster.lock:
            del self.cluster.objects["rayjobs", rayjob["metadata"]["name"]]

    def _reconcile(self, rayjob: Stored) -> None:
        if "deletionTimestamp" in rayjob["metadata"]:
            return self._finalize(rayjob)
        if "kueue.x-k8s.io/queue-name" in rayjob["metadata"]["labels"]:
            with self.cluster.lock:
                rayjob["spec"] = rayjob["spec"] | {"suspend": not self.admits}
        status = rayjob.get("status") or {}
        cluster = self.ray_clusters.get(status.get("rayClusterName", ""))
        is_whole = bool(cluster) and cluster.reconcile(self.kubelet)
        match status.get("jobDeploymentStatus", ""):
            case "":
                self._begin(rayjob)
            case "Initializing" | "Running" if rayjob["spec"].get("suspend"):
                self._write(rayjob, jobDeploymentStatus="Suspending")
            case "Initializing" if cluster and is_whole:
                self._write(rayjob, jobDeploymentStatus="Running")  # and the next look submits its job
            case "Running" if cluster:
                self._look(rayjob, cluster)
            case "Suspending":
                self._let_go(rayjob, "Suspended")
            case "Suspended" if not rayjob["spec"].get("suspend"):
                self._write(rayjob, jobDeploymentStatus="")
            case "Retrying":
                self._let_go(rayjob, "")
            case "Complete" | "Failed":
                self._clean(rayjob)
        return None

    def _keep_service(self, service: Stored) -> None:
        """Take a RayService a step further: its cluster, then its applications, then what it says of itself."""
        name = cluster_of_service(service)
        cluster = self.ray_clusters.get(name)
        if "deletionTimestamp" in service["metadata"]:
            if cluster:
                return self._delete(name)
            with self.cluster.lock:
                del self.cluster.objects["rayservices", service["metadata"]["name"]]
            return None
        if cluster is None:
            name = self._make_cluster(service, service["spec"]["rayClusterConfig"], "").name
            return self._say(service, "pendingServiceStatus", name, {})
        if not cluster.reconcile(self.kubelet):
            return None
        with suppress(OSError):
            found = cluster.ask("/api/serve/applications/").get("applications", {})
            if not found:
                config = yaml.safe_load(service["spec"]["serveConfigV2"])
                config["http_options"] = {"host": _HOST, "port": cluster.serves_at}
                cluster.ask("/api/serve/applications/", config, "PUT")
            statuses = {each: {"status": app["status"], "message": app["message"]} for each, app in found.items()}
            runs = bool(found) and all(app["status"] == "RUNNING" for app in found.values())
            part = "activeServiceStatus" if runs else "pendingServiceStatus"
            self._say(service, part, name, statuses)
        return None

    def _say(self, service: Stored, part: str, name: str, statuses: Stored) -> None:
        """Write into a RayService what its cluster is, and whether it answers."""
        is_ready = part == "activeServiceStatus"
        reason = "NonZeroServeEndpoints" if is_ready else "Initializing"
        condition = {"type": "Ready", "status": str(is_ready), "reason": reason, "message": ""}
        status = {"conditions": [condition], part: {"rayClusterName": name, "applicationStatuses": statuses}}
        with self.cluster.lock:
            service["status"] = status

    def _begin(self, rayjob: Stored) -> None:
        job_id = f"{rayjob['metadata']['name']}-{_suffix()}"
        made = self._make_cluster(rayjob, rayjob["spec"]["rayClusterSpec"], job_id)
        self._write(rayjob, jobDeploymentStatus="Initializing", rayClusterName=made.name, jobId=job_id)

    def _make_cluster(self, owner: Stored, spec: Stored, job_id: str) -> RayCluster:
        """A cluster of Ray, and its Secret, for a RayJob or a RayService."""
        made = RayCluster(f"{owner['metadata']['name']}-{_suffix()}", spec, job_id)
        self.ray_clusters[made.name] = made
        secret = {"metadata": {"name": made.name}, "stringData": {"auth_token": made.token}}
        finalizer = f"ray.io/{owner['kind'].lower()}-finalizer"
        with self.cluster.lock:
            self.cluster.objects["secrets", made.name] = secret
            owner["metadata"] = owner["metadata"] | {"finalizers": [finalizer]}
        return made

    def _submit(self, rayjob: Stored, cluster: RayCluster) -> None:
        job = {"entrypoint": rayjob["spec"]["entrypoint"], "submission_id": rayjob["status"]["jobId"]}
        with suppress(OSError):
            cluster.ask("/api/jobs/", job)

    def _look(self, rayjob: Stored, cluster: RayCluster) -> None:
        """Ask what became of a job; one that its head does not know, as it is a new one, is handed over again."""
        name = rayjob["metadata"]["name"]
        try:
            found = cluster.ask(f"/api/jobs/{rayjob['status']['jobId']}")
        except HTTPError as error:
            if error.code == 404:
                self._submit(rayjob, cluster)
            return
        except OSError:
            since = self._silent_since.setdefault(name, time.monotonic())
            self._write(rayjob, jobStatusCheckFailureStartTime="2026-11-22T02:50:53Z")
            if time.monotonic() - since > self.gives_up_s:
                self._write(rayjob, jobDeploymentStatus="Failed", reason="JobStatusCheckTimeoutExceeded")
            return
        self._silent_since.pop(name, None)
        self._write(rayjob, jobStatus=found["status"], jobStatusCheckFailureStartTime=None)
        if found["status"] in ("SUCCEEDED", "STOPPED"):
            self._write(rayjob, jobDeploymentStatus="Complete")
        elif found["status"] == "FAILED":
            failed = rayjob["status"].get("failed", 0) + 1
            is_last = failed > rayjob["spec"]["backoffLimit"]
            words = {"reason": "AppFailed", "message": found["message"], "failed": failed}
            self._write(rayjob, jobDeploymentStatus="Failed" if is_last else "Retrying", **words)

    def _let_go(self, rayjob: Stored, then: str) -> None:
        """Delete a RayJob's cluster; what comes then does not wait for its pods."""
        self._delete(rayjob["status"].get("rayClusterName", ""))
        self._write(rayjob, jobDeploymentStatus=then, rayClusterName="", jobId="", jobStatus="")

    def _clean(self, rayjob: Stored) -> None:
        ended = self._ended.setdefault(rayjob["metadata"]["uid"], time.monotonic())
        if time.monotonic() - ended > rayjob["spec"]["ttlSecondsAfterFinished"] * self._time_scale:
            self._delete(rayjob["status"]["rayClusterName"])

    def _delete(self, name: str) -> None:
        cluster = self.ray_clusters.pop(name, None)
        if cluster:
            with self.cluster.lock:
                del self.cluster.objects["secrets", name]  # which its cluster owns
            for pod in cluster.pods(self.kubelet):
                self.kubelet.delete(pod.name)

    def _write(self, rayjob: Stored, **changes: Any) -> None:
        with self.cluster.lock:
            rayjob["status"] = {**rayjob.get("status", {}), **changes}


def cluster_of_service(service: Stored) -> str:
    """The name of the cluster of Ray that a RayService has; empty before there is one."""
    status = service.get("status") or {}
    parts = [status.get(part) or {} for part in ("activeServiceStatus", "pendingServiceStatus")]
    return next((part["rayClusterName"] for part in parts if part), "")


def _kind(pod: Pod) -> str:
    return str(pod.stored["metadata"]["labels"]["ray.io/node-type"])


def _suffix() -> str:
    return "".join(random.choices(_LETTERS, k=5))
