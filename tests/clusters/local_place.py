"""The local cluster as a place for the contract suite: of this process's user, or of another machine over a link."""

import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from local_cluster import job, make_run_dir
from waiting import until

from clusters import process
from clusters.entry import entry_text
from clusters.local import Local
from clusters.ray_head import Head
from orchestrator.runs import new_id
from runfolder.chain import close, last_attempt
from runfolder.delivered import note_delivered


class LocalPlace:
    """A local cluster whose home is `root`; its node is the machine's Ray."""

    waits = r"needs \d cpus?, 0 of \d+ cpus are free"
    lost = "this cluster has not got the run"

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.resources = {"workers_per_node": 2}
        self._cluster = Local(root)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """A run whose controller sleeps has all workers."""
        stand_in = self._stand_in_for_ray()
        sleeper = self._submit_sleeper()
        try:
            yield
        finally:
            if self.taken():
                stand_in()  # what waits gets the real one
            close(sleeper, {"state": "succeeded", "reason": None})
            note_delivered(sleeper, None)
            if controller := process.owner(self._cluster.controller_lock(sleeper.name)):
                os.kill(controller, signal.SIGKILL)
            until(lambda: self._cluster.queue.get(sleeper.name) is None)
            stand_in()

    def _stand_in_for_ray(self) -> Callable[[], None]:
        """Where Ray is not up, something that listens in its place, as nothing is to start; gives what ends it."""
        head = Head(self._cluster.folder)
        if process.owner(head.lock):
            return lambda: None
        head.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
        (folder / "ray").mkdir()
        (head.folder / "ray.folder").write_text(str(folder))
        listener = socket.create_server(("127.0.0.1", 0))
        (folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        process.spawn(head.lock, ["sleep", "600"], os.environ, head.log)

        def end() -> None:
            if listener.fileno() >= 0:
                listener.close()
                process.end(head.lock)

        return end

    def _submit_sleeper(self) -> Path:
        cluster, everything = self._cluster, job(workers_per_node=1024)
        run_dir = make_run_dir(self.root / "runs" / new_id("sleeper"), everything)
        lock = cluster.controller_lock(run_dir.name)
        lock.parent.mkdir(parents=True, exist_ok=True)
        entry = json.loads(entry_text(run_dir, everything.resources.world_size, {}))
        cluster.queue.add(run_dir.name, json.dumps({**entry, "command": ["sleep", "600"]}))
        lock.touch()  # it had its turn
        return run_dir

    def taken(self) -> list[str]:
        """The runs in its queue, which are there until MLflow has them."""
        return [entry.run_id for entry in self._cluster.queue.list() if not entry.run_id.startswith("sleeper-")]

    def forget(self, run_id: str) -> None:
        """Remove the run's entry."""
        (self._cluster.queue.folder / f"{run_id}.json").unlink()

    def end_worker(self, run_id: str) -> None:
        """Kill the process that the log of rank 0 names."""
        log = last_attempt(self.root / "runs" / run_id).folder / "logs" / "rank-0.log"
        os.kill(_workers(log)[0], signal.SIGKILL)

    def warn(self, run_id: str) -> None:
        """What a shutdown of the machine does to a controller."""
        controller = process.owner(self._cluster.controller_lock(run_id))
        assert controller
        os.kill(controller, signal.SIGTERM)

    def lose_node(self) -> None:
        """Kill Ray with all of its session; the supervisor starts it again."""
        head = self._cluster.state()["head"]
        for pid in [pid for pid in psutil.pids() if os.getsid(pid) == head]:
            os.kill(pid, signal.SIGKILL)

    def is_idle(self) -> bool:
        """Whether no run has a controller, and no worker that a log names is alive."""
        logs = (self.root / "runs").glob("*/attempts/*/logs/rank-*.log")
        workers = [pid for log in logs for pid in _workers(log)]
        return not self._cluster.state()["controllers"] and not any(map(_lives, workers))


def _workers(log: Path) -> list[int]:
    """The process that wrote a log, as its first line says."""
    return [int(found) for found in re.findall(r"^\[rank \d+\] pid (\d+) on", log.read_text())]


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
