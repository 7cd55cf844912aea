"""What Kubernetes does with pods, where each is a tree of processes on this machine (container.py).

Pods share this machine's network and /tmp: who starts Ray in them gives each of them ports and a folder of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from api_server import Cluster, Stored
from kubernetes_rules import variables_in
from pod_security import broken_rules

_CONTAINER = Path(__file__).with_name("container.py")
_PROBE_S = 2.0
NO_NODE = "0/2 nodes are available: 2 Insufficient cpu."


@dataclass
class Pod:
    """A pod: what the API has of it, the command of its container, and what asks whether that is ready."""

    stored: Stored
    command: Sequence[str]
    environment: Mapping[str, str]
    probes: Sequence[str]
    folder: Path  # what it has at /tmp
    may_start: Callable[[], bool] = lambda: True  # what its init container waits for
    process: subprocess.Popen[bytes] | None = None
    hook: subprocess.Popen[bytes] | None = None
    deadline: float = 0.0  # when the container of a pod that was told to end is killed
    node_back: float = 0.0  # when the node of a pod is back that it has lost

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.stored["metadata"]["name"])

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to end."""
        return "deletionTimestamp" in self.stored["metadata"]

    @property
    def is_over(self) -> bool:
        """Whether its container has ended."""
        return self.stored["status"].get("phase") in ("Succeeded", "Failed")

    @property
    def is_ready(self) -> bool:
        """Whether its container is ready."""
        containers = self.stored["status"].get("containerStatuses", [])
        return bool(containers) and all(container["ready"] for container in containers)

    def kill(self) -> None:
        """A power failure."""
        for process in (self.process, self.hook):
            if process and process.stdin:
                process.stdin.close()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Kubelet:
    """The pods of a cluster. Nothing happens to them but in `tick`, and where a test does it."""

    def __init__(self, cluster: Cluster, logs: Path) -> None:
        self.cluster = cluster
        self.pods: dict[str, Pod] = {}
        self.is_full = False  # whether no node has room for another pod
        self.made = 0
        self.folders = Path(tempfile.mkdtemp(prefix="ft-pods-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self._logs = logs
        self._lock = threading.RLock()  # of the pods, to which a test and the operator's thread do something

    def new_folder(self) -> Path:
        """A folder for a pod."""
        return Path(tempfile.mkdtemp(dir=self.folders))

    def close(self) -> None:
        """Lose all pods."""
        for name in list(self.pods):
            self.lose(name)
        shutil.rmtree(self.folders)

    def create(self, pod: Pod) -> None:
        """Have a pod that waits for a node; raises ValueError for one that the namespace does not let in."""
        broken = broken_rules(pod.stored["spec"])
        if broken:
            words = ", ".join(sorted(broken))
            raise ValueError(f'pods "{pod.name}" is forbidden: violates PodSecurity "restricted:latest": {words}')
        self.made += 1
        self.pods[pod.name] = pod
        with self.cluster.lock:
            self.cluster.objects["pods", pod.name] = pod.stored

    def tick(self) -> None:
        """Take every pod one step further."""
        for pod in list(self.pods.values()):
            with self._lock:
                if pod.name in self.pods:
                    self._step(pod)

    def delete(self, name: str) -> None:
        """Tell a pod to end, as an eviction does, too: its hook runs, then it gets SIGTERM, and at last SIGKILL."""
        pod = self.pods[name]
        with self._lock:
            if pod.is_leaving:
                return
            self._write(pod, metadata=pod.stored["metadata"] | {"deletionTimestamp": "2026-11-22T02:50:53Z"})
            pod.deadline = time.monotonic() + pod.stored["spec"]["terminationGracePeriodSeconds"]
            if pod.process and pod.process.poll() is None:
                (container,) = pod.stored["spec"]["containers"]
                pod.hook = self._run(pod, container["lifecycle"]["preStop"]["exec"]["command"])

    def lose_node(self, name: str, back_after_s: float) -> None:
        """Lose the node of a pod: the pod is not ready any more, and stays until the node is back, or is removed."""
        with self._lock:
            pod = self.pods[name]
            pod.kill()
            pod.node_back = time.monotonic() + back_after_s
            self._write(pod, status=_running(is_ready=False))

    def lose(self, name: str) -> None:
        """Lose a pod without a warning, as one that is deleted by force."""
        with self._lock:
            self.pods[name].kill()
            with self.cluster.lock:
                self.cluster.objects.pop(("pods", name), None)
            del self.pods[name]  # last: whoever finds no pods finds nothing of them

    def _step(self, pod: Pod) -> None:
        if time.monotonic() < pod.node_back:
            return
        if pod.is_leaving:
            self._end(pod)
        elif pod.process is None:
            self._start(pod)
        elif pod.process.poll() is not None:
            self._write(pod, status={"phase": "Failed" if pod.process.returncode else "Succeeded"})
        elif not pod.is_ready and all(map(_answers, pod.probes)):
            self._write(pod, status=_running(is_ready=True))

    def _start(self, pod: Pod) -> None:
        if self.is_full:
            no_node = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_NODE}
            self._write(pod, status={"phase": "Pending", "conditions": [no_node]})
        elif "nodeName" not in pod.stored["spec"]:
            self._write(pod, spec=pod.stored["spec"] | {"nodeName": "gpu-1"}, status={"phase": "Pending"})
        elif pod.may_start():
            pod.process = self._run(pod, pod.command)
            self._write(pod, status=_running(is_ready=False))

    def _write(self, pod: Pod, **parts: Stored) -> None:
        with self.cluster.lock:
            pod.stored.update(parts)

    def _run(self, pod: Pod, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A command in a pod's container, whose own it is or not."""
        with (self._logs / f"{pod.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CONTAINER), *command],
                env=dict(pod.environment),
                cwd=pod.folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, pod: Pod) -> None:
        is_late = time.monotonic() > pod.deadline
        process = pod.process
        if process and process.poll() is None and not is_late:
            if pod.hook and pod.hook.poll() is not None:
                pod.hook = None
                process.send_signal(signal.SIGTERM)
            return
        self.lose(pod.name)


def _running(is_ready: bool) -> Stored:
    return {"phase": "Running", "containerStatuses": [{"ready": is_ready}]}


def environment_of(pod: Stored, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a pod's container: of its image, of whoever made the pod, and of its manifest."""
    (container,) = pod["spec"]["containers"]
    variables = {**given, **variables_in(container)}
    for variable in container["env"]:
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if path == "metadata.name":
            variables[variable["name"]] = pod["metadata"]["name"]
        elif path:
            label = path.removeprefix("metadata.labels['").removesuffix("']")
            variables[variable["name"]] = pod["metadata"]["labels"][label]
    return variables


def _answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=_PROBE_S) as answer:
        return b"success" in answer.read()
    return False


def image_environment(folder: Path) -> dict[str, str]:
    """What the image of the runs sets: here, what finds this interpreter's programs first."""
    programs = Path(sys.executable).parent
    return {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "RAY_TMPDIR": str(folder)}
