"""What a RayJob runs on its head: `python -m clusters.pod_job RUN_DIR NAME NODES`.

It starts the controller until the run has its result. KubeRay replaces a worker pod that is lost, in the same
cluster: the controller is started again once all nodes are there. Exit code 0: the run is closed, for good or ill, or
was started again elsewhere; 1: KubeRay is to try with a new cluster, after a rest that grows, as it knows none.
A pod that must end (clusters/pod_leaving.py) is a warning to the controller, which has the trainer save.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from clusters.controllers import COLLECTED, controller_command, on_nodes
from clusters.job_start import JobStart
from clusters.pod_starts import begin_start, leaving_pods
from clusters.ray_head import Backoff
from runfolder.chain import result

_TRY_AGAIN = 1
_POD_POLL_S = 0.5
_REPLACED_S = 1800.0  # until KubeRay has replaced what is lost; then a new cluster may find other nodes
_GONE_S = 60.0  # until a pod that must end is gone
_POD_LOSS_S = 30.0  # that a controller has to notice the loss of a pod
_SHORTEST_REST_S = 15.0
_LONGEST_REST_S = 600.0
_UNUSABLE_S = 60.0  # between two looks at a run folder that cannot be used


class JoinedNodes(Protocol):
    """The nodes of workers that Ray's head has."""

    def ids(self) -> set[str]:
        """The ids of those that are alive."""
        ...


class NodesOfRay:
    """The nodes of the cluster that this process is in; it joins that as a driver."""

    def __init__(self) -> None:
        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")

    def ids(self) -> set[str]:
        """The ids of the nodes with cores for workers that are alive."""
        from clusters.ray_nodes import ids_with_cores

        return ids_with_cores()


@dataclass
class PodJob:
    """One start of a submission, with the nodes that it wants."""

    start: JobStart
    nodes: JoinedNodes
    wanted: int
    told: threading.Event = field(default_factory=threading.Event)
    _leaving: set[str] = field(default_factory=set)  # pods that must end, or have, of which a controller was told
    awaits_end: int = 0  # how many pods a controller was just told of
    _told_among: set[str] = field(default_factory=set)  # the nodes that were alive then

    def keep(self) -> int:
        """Start the controller until the run has its result, or cannot go on in this cluster; gives the exit code."""
        backoff = Backoff()
        while self.start.is_latest():
            if not self._are_nodes_there():
                return _TRY_AGAIN
            while not backoff.ready():
                self.told.wait(_POD_POLL_S)
            backoff.began()
            self._run_controller()
            if result(self.start.run_dir) is not None:  # one that was resumed while the rest was delivered has none
                return 0
            if self.told.is_set():
                return _TRY_AGAIN
        print("the run was started again elsewhere; nothing to do", flush=True)
        return 0

    def rest(self) -> None:
        """Wait, longer with every start of the submission, unless this process is told to end."""
        doublings = min(self.start.requeues, 16)
        rest_s = _SHORTEST_REST_S * 2.0**doublings
        self.told.wait(min(_LONGEST_REST_S, rest_s))

    def _are_nodes_there(self) -> bool:
        """Wait until all nodes are there, once those that must end are gone; False where that takes too long."""
        if self.awaits_end:
            self._wait_for(self._have_ended, _GONE_S)
            self.awaits_end = 0
        return self._wait_for(lambda: len(self.nodes.ids()) >= self.wanted, _REPLACED_S)

    def _have_ended(self) -> bool:
        """Whether the pods are gone that must end; what replaces them may be there before that."""
        alive = self.nodes.ids()
        gone = self._told_among - alive
        return len(gone) >= self.awaits_end or len(alive) < self.wanted

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether a condition comes true in time, before this process is told to end."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.told.wait(_POD_POLL_S):
                return False
        return not self.told.is_set()

    def _run_controller(self) -> None:
        """Run the controller once, and tell it once when a pod must end.

        One that does not end by itself after a pod is lost is killed: it may wait for that pod to start its workers.
        """
        run_dir = self.start.run_dir
        environment = os.environ | COLLECTED | on_nodes(self.wanted)
        controller = subprocess.Popen(controller_command(str(run_dir)), env=environment)
        try:
            self._watch(controller)
        finally:
            controller.kill()
            controller.wait()

    def _watch(self, controller: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a controller, or bring it about."""
        is_told = False
        whole_at = time.monotonic()
        while controller.poll() is None:
            if not is_told and self._must_end():
                controller.send_signal(signal.SIGTERM)
                is_told = True
            if len(self.nodes.ids()) >= self.wanted:
                whole_at = time.monotonic()
            elif time.monotonic() - whole_at > _POD_LOSS_S and result(self.start.run_dir) is None:
                controller.kill()
            time.sleep(_POD_POLL_S)

    def _must_end(self) -> bool:
        """Whether this process is told to end, or a pod is that it has not heard of before."""
        leaving = leaving_pods(self.start.run_dir)
        if not leaving <= self._leaving:
            others = leaving - self._leaving
            self.awaits_end = len(others)
            self._told_among = self.nodes.ids()
            self._leaving = leaving
        return bool(self.awaits_end) or self.told.is_set()


def main(run_dir: Path, name: str, wanted: int) -> int:
    """Take the run as far as this cluster lasts; gives the exit code."""
    try:
        print_to(entrypoint_log(run_dir.parent.parent, name))
        nodes = NodesOfRay()
        job = PodJob(begin_start(run_dir, name), nodes, wanted)
        signal.signal(signal.SIGTERM, lambda *_: job.told.set())  # behind ray.init, which sets one of its own
        code = job.keep()
    except OSError as error:
        print(f"the run folder cannot be used: {error}", flush=True)
        time.sleep(_UNUSABLE_S)
        return _TRY_AGAIN
    if code == _TRY_AGAIN:
        job.rest()
    return code


def entrypoint_log(home: Path, name: str) -> Path:
    """Where the entrypoints of a submission print, one after the other: its pods' own logs go with them."""
    return home / "kubernetes" / f"{name}.log"


def print_to(log: Path) -> None:
    """Have this process and those that it starts print to the end of a file."""
    log.parent.mkdir(exist_ok=True, mode=0o700)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
