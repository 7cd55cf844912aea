"""A Kubernetes cluster of the tests as a place for the contract suite: two nodes, each a tree of processes."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kubelet import Kubelet, Pod
from kuberay import KubeRay
from waiting import until

from clusters.base import run_of_submission
from clusters.kubernetes_answers import goes_on
from runfolder.chain import last_attempt

_BACK_AFTER_S = 10.0


class KubernetesPlace:
    """A namespace, whose volume is the folder `root`."""

    waits = "0/2 nodes are available: 2 Insufficient"
    lost = "namespace fleetune has no RayJob or RayService of it"

    def __init__(self, name: str, root: Path, operator: KubeRay) -> None:
        self.name, self.root = name, root
        self.resources = {"nodes": 2, "workers_per_node": 1}
        self.operator = operator
        self.kubelet: Kubelet = operator.kubelet

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Others have all nodes."""
        self.kubelet.is_full = True
        try:
            yield
        finally:
            self.kubelet.is_full = False

    def taken(self) -> list[str]:
        """The runs whose RayJobs go on."""
        cluster = self.operator.cluster
        with cluster.lock:
            rayjobs = [stored for (kind, _), stored in cluster.objects.items() if kind == "rayjobs"]
        return [run_of_submission(rayjob["metadata"]["name"]) for rayjob in rayjobs if goes_on(rayjob)]

    def forget(self, run_id: str) -> None:
        """Delete the run's RayJob, as who has the rights may do, and wait until it is gone."""
        cluster = self.operator.cluster
        cluster.remove("rayjobs", f"{run_id}-s1")
        until(lambda: ("rayjobs", f"{run_id}-s1") not in cluster.objects)

    def forget_all(self) -> None:
        """Delete all RayJobs that go on, and wait until nothing of them is left."""
        for run_id in self.taken():
            for kind, name in [*self.operator.cluster.objects]:
                if kind == "rayjobs" and run_of_submission(name) == run_id:
                    self.operator.cluster.remove(kind, name)
        for pod in [*self.kubelet.pods.values()]:
            if pod.node_back:
                self.kubelet.lose(pod.name)
        until(self.is_idle, 180)

    def end_worker(self, run_id: str) -> None:
        """Kill the process that the log of rank 0 names."""
        log = last_attempt(self.root / "runs" / run_id).folder / "logs" / "rank-0.log"
        found = re.match(r"\[rank 0\] pid (\d+) on", log.read_text())
        assert found
        os.kill(int(found[1]), signal.SIGKILL)

    def warn(self, run_id: str) -> None:
        """Drain the node of a worker: its pod is told to end, and gets another one."""
        self.kubelet.delete(self.pods("worker", run_id)[0].name)

    def lose_node(self) -> None:
        """A power failure where the last worker is; its node is back after a while."""
        self.kubelet.lose_node(self.pods("worker")[-1].name, _BACK_AFTER_S)

    def is_idle(self) -> bool:
        """Whether no pod is left, no process and no RayJob that goes on."""
        assert self.operator.error is None
        return not self.kubelet.pods and not self.taken()

    def pods(self, kind: str, run_id: str = "") -> list[Pod]:
        """The pods that run of a kind, head or worker; of one run, or of all."""
        found = []
        for pod in self.kubelet.pods.values():
            labels = pod.stored["metadata"]["labels"]
            if labels["ray.io/node-type"] == kind and run_id in ("", labels["fleetune/run"]) and not pod.is_leaving:
                found.append(pod)
        return found
