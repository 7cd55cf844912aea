"""What a RayJob runs on its head: `python -m clusters.pod_job RUN_DIR NAME NODES`.

It starts the controller until the run has its result. KubeRay replaces a worker pod that is lost, in the same
cluster: the controller is started again once all nodes are there. Exit code 0: the run is closed, for good or ill, or
was started again elsewhere, or start after start made no attempt at it, which is left to people; 1: KubeRay is to try
with a new cluster, after a rest that grows, as it knows none. Whatever it waits for, it closes a run that is to end.
A pod that must end (clusters/pod_leaving.py) is a warning to the controller, which has the trainer save.
"""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from clusters.base import Unreachable, submission_name
from clusters.closing import close_cancelled, end_without_controller, seconds_of_walltime_left
from clusters.controllers import COLLECTED, controller_command, on_nodes
from clusters.job_start import JobStart
from clusters.pod_starts import HINDERED_STARTS, begin_start, leaving_pods
from clusters.ray_head import Backoff
from clusters.run_files import last_line, size_of
from runfolder.chain import last_slot, result
from runfolder.files import Damaged
from runfolder.hindrance import note_hindrance
from runfolder.latest_start import note_latest_start
from runfolder.record import load_any_job
from runfolder.requests import cancel_requested
from runfolder.snapshot import has_ended

_TRY_AGAIN = 1
_POD_POLL_S = 0.5
_REPLACED_S = 600.0  # until KubeRay has replaced what is lost, which it never does where a node does not come back
_GONE_S = 60.0  # until a pod that must end is gone
_POD_LOSS_S = 30.0  # that a controller has to notice the loss of a pod
_BEGIN_S = 300.0  # that a controller has to begin an attempt, or to close the run
_KILLED_S = 10.0  # until one that is killed has ended, which it cannot while its storage does not answer
_SHORTEST_REST_S = 15.0
_LONGEST_REST_S = 600.0
_MOST_FRUITLESS = 5  # controllers in a row, until a new cluster is tried
_UNUSABLE_S = 60.0  # between two looks at a run folder that cannot be used
_GO_ON = "fleetune resume goes on from the newest checkpoint"


class JoinedNodes(Protocol):
    """The nodes of workers that Ray's head has."""

    def ids(self) -> set[str]:
        """The ids of those that are alive."""
        ...


class NodesOfRay:
    """The nodes of the cluster that this process is in."""

    def join(self) -> None:
        """Join it as a driver, before the first question; raises what Ray raises."""
        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")

    def ids(self) -> set[str]:
        """The ids of the nodes with cores for workers that are alive."""
        from clusters.ray_nodes import ids_with_cores

        return ids_with_cores()


class Hindered(Exception):
    """No controller makes an attempt at the run in this cluster."""


@dataclass
class PodJob:
    """One start of a submission, with the nodes that it wants, and the walltime of its run."""

    start: JobStart
    nodes: JoinedNodes
    wanted: int
    walltime: int | None = None
    told: threading.Event = field(default_factory=threading.Event)
    _leaving: set[str] = field(default_factory=set)  # pods that must end, or have, of which a controller was told
    awaits_end: int = 0  # how many pods a controller was just told of
    _told_among: set[str] = field(default_factory=set)  # the nodes that were alive then
    _alive: set[str] = field(default_factory=set)  # those that Ray named last
    _silence: str = ""  # why it names none now

    def keep(self) -> int:
        """Start the controller until the run has its result, or cannot go on in this cluster; gives the exit code.

        Raises Hindered where controllers end without an attempt, again and again.
        """
        backoff = Backoff()
        run_dir = self.start.run_dir
        self._leaving = leaving_pods(run_dir)  # an earlier head pod of this cluster among them: they are no news
        fruitless = 0
        while self.start.is_latest():
            if not self._are_nodes_there() or not self._wait_for(backoff.ready, math.inf):
                return _TRY_AGAIN
            backoff.began()
            slot = note_latest_start(run_dir)
            words = self._run_controller()
            if result(run_dir) is not None:  # one that was resumed while the rest was delivered has none
                return 0
            if self.told.is_set():
                return _TRY_AGAIN
            fruitless = fruitless + 1 if last_slot(run_dir) == slot else 0
            if fruitless:
                self._note_fruitless(fruitless, words)
        print("the run was started again elsewhere; nothing to do", flush=True)
        return 0

    def rest(self) -> int:
        """Wait, longer with every start of the submission, unless there is no next one; gives the exit code."""
        run_dir = self.start.run_dir
        doublings = min(self.start.requeues, 16)
        rest_s = _SHORTEST_REST_S * 2.0**doublings
        self._wait_for(lambda: False, min(_LONGEST_REST_S, rest_s))
        if self.told.is_set():
            return _TRY_AGAIN
        try:
            if is_cancelled(run_dir):
                close_cancelled(run_dir)
            elif self._walltime_left() <= 0 and self.start.is_latest():
                why = f"resources.walltime of {self.walltime} s is over; {_GO_ON}"
                end_without_controller(run_dir, "failed", "walltime", why)
        except (Damaged, OSError, Unreachable) as error:
            print(error, flush=True)
        return 0 if has_ended(run_dir) else _TRY_AGAIN

    def give_up(self, why: str) -> int:
        """Note why no attempt is made in this cluster; gives the exit code: after some in a row no new one is due."""
        print(f"no attempt at the run in this cluster: {why}", flush=True)
        run_dir = self.start.run_dir
        submission = self.start.submission
        with suppress(Damaged, OSError):  # the run folder may be what is wrong
            starts = note_hindrance(run_dir, submission, why, gives_up=True)
            if starts >= HINDERED_STARTS:
                todo = f"mend that, then: fleetune resume {run_dir.name}"
                note_hindrance(run_dir, submission, f"{starts} starts in a row came to nothing: {why}; {todo}")
                return 0
        return _TRY_AGAIN

    def _note_fruitless(self, count: int, words: str) -> None:
        """Note that controllers end without an attempt, for who looks; raises Hindered where they are too many."""
        why = f"controllers that made no attempt at the run: {count}; the last one said: {words}"
        note_hindrance(self.start.run_dir, self.start.submission, why)
        if count >= _MOST_FRUITLESS:
            raise Hindered(why)

    def _are_nodes_there(self) -> bool:
        """Wait until all nodes are there, once those that must end are gone; False where there is no more to wait."""
        if self.awaits_end:
            self._wait_for(self._have_ended, _GONE_S)
            self.awaits_end = 0
        return self._wait_for(lambda: len(self._nodes_alive()) >= self.wanted, _REPLACED_S)

    def _have_ended(self) -> bool:
        """Whether the pods are gone that must end; what replaces them may be there before that."""
        alive = self._nodes_alive()
        gone = self._told_among - alive
        have_left = len(gone) >= self.awaits_end
        return have_left or len(alive) < self.wanted

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether a condition comes true in time, while this process and the run are to go on."""
        time_left_s = self._walltime_left()
        deadline = time.monotonic() + min(timeout_s, time_left_s)
        while time_left_s > 0 and not self.told.is_set() and not is_cancelled(self.start.run_dir):
            if condition():
                return True
            if time.monotonic() > deadline:
                break
            self.told.wait(_POD_POLL_S)
        return False

    def _walltime_left(self) -> float:
        """How many seconds of the run's walltime are left; no attempt begins behind it."""
        with suppress(Damaged, OSError):  # then the controller says so
            return seconds_of_walltime_left(self.start.run_dir, self.walltime)
        return math.inf

    def _nodes_alive(self) -> set[str]:
        """The nodes that are alive; while Ray does not say, those of the time before."""
        try:
            self._alive = self.nodes.ids()
            self._silence = ""
        except Exception as error:  # whatever Ray raises: where its head is gone for good, this process is too
            if not self._silence:
                print(f"Ray does not say which nodes there are: {error}", flush=True)
            self._silence = str(error)
        return self._alive

    def _run_controller(self) -> str:
        """Run the controller once, and tell it once when a pod must end; gives its last words.

        One that does not end by itself after a pod is lost is killed: it may wait for that pod to start its workers.
        """
        run_dir = self.start.run_dir
        log = entrypoint_log(run_dir.parent.parent, submission_name(run_dir.name, self.start.submission))
        said = size_of(log)
        environment = os.environ | COLLECTED | on_nodes(self.wanted)
        controller = subprocess.Popen(controller_command(str(run_dir)), env=environment)
        try:
            self._watch(controller)
        finally:
            controller.kill()
            with suppress(subprocess.TimeoutExpired):
                controller.wait(_KILLED_S)
        return last_line(log, said) or f"exit code {controller.returncode}"

    def _watch(self, controller: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a controller, or bring it about. Raises Hindered for one that begins nothing."""
        is_told = False
        slot = last_slot(self.start.run_dir)
        began = whole_at = time.monotonic()
        while controller.poll() is None:
            with suppress(Damaged, OSError):  # what cannot be read now may be there at the next look
                if not is_told and self._must_end():
                    controller.send_signal(signal.SIGTERM)
                    is_told = True
                if len(self._nodes_alive()) >= self.wanted:
                    whole_at = time.monotonic()
                elif time.monotonic() - whole_at > _POD_LOSS_S and result(self.start.run_dir) is None:
                    controller.kill()
                if time.monotonic() - began > _BEGIN_S and not self._has_begun(slot):
                    raise Hindered(f"a controller did nothing for {_BEGIN_S:.0f} s, and was killed")
            time.sleep(_POD_POLL_S)

    def _has_begun(self, slot: int) -> bool:
        """Whether an attempt was begun since that slot was the last, or the run is closed."""
        run_dir = self.start.run_dir
        is_closed = result(run_dir) is not None
        return is_closed or last_slot(run_dir) != slot

    def _must_end(self) -> bool:
        """Whether this process is told to end, or a pod is that it has not heard of before."""
        leaving = leaving_pods(self.start.run_dir)
        if not leaving <= self._leaving:
            others = leaving - self._leaving
            self.awaits_end = len(others)
            self._told_among = self._nodes_alive()
            self._leaving = leaving
        return bool(self.awaits_end) or self.told.is_set()


def main(run_dir: Path, name: str, wanted: int) -> int:
    """Take the run as far as this cluster lasts; gives the exit code."""
    try:
        print_to(entrypoint_log(run_dir.parent.parent, name))
        start = begin_start(run_dir, name)
    except OSError as error:
        print(f"the run folder cannot be used: {error}", flush=True)
        time.sleep(_UNUSABLE_S)
        return _TRY_AGAIN
    nodes = NodesOfRay()
    job = PodJob(start, nodes, wanted)
    try:
        with suppress(Damaged):  # which the controller says, and closes the run
            job.walltime = load_any_job(run_dir).resources.walltime
        nodes.join()
        signal.signal(signal.SIGTERM, lambda *_: job.told.set())  # behind ray.init, which sets one of its own
        code = job.keep()
    except Exception as error:  # of Ray, of the run folder, of ours: whatever it is, each try takes a whole cluster
        what = "" if isinstance(error, Hindered) else f"{type(error).__name__}: "
        code = job.give_up(f"{what}{error}")
    if code == _TRY_AGAIN:
        return job.rest()
    return code


def is_cancelled(run_dir: Path) -> bool:
    """Whether the end of a run is asked for, as far as its folder can be read."""
    with suppress(Damaged, OSError):
        return cancel_requested(run_dir)
    return False


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
