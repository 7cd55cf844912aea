"""An attempt that was paused and wakes after a newer one began changes nothing that anybody reads."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import worker
from mlflow_server import Proxy, Server
from run_folders import make_run
from scene import delivered, lives, mlflow_run, reported, rows, session, signal_all, unfinished_saves, until, workers

from clusters.controllers import controller_command
from clusters.ray_head import Head
from orchestrator.tracking.history import history
from runfolder.appended import Follower, read_from
from runfolder.chain import Attempt, attempts, last_attempt, result
from runfolder.delivered import is_delivered
from trainer.checkpoint.lineage import newest

pytestmark = pytest.mark.timeout(600)


def readable(run_dir: Path) -> dict[str, Any]:
    """All that readers of a run see."""
    start = newest(run_dir)
    assert start
    checkpoint = run_dir / "attempts" / str(start.attempt) / "checkpoints" / f"step-{start.step}"
    return {
        "files": {path: path.read_bytes() for path in contents(run_dir / "output", checkpoint)},
        "result": ((run_dir / "result.json").read_bytes(), result(run_dir)),
        "history": history(run_dir),
        "logs": [list(Follower(partial(read_from, run_dir, f"logs/rank-{rank}.log")).read()) for rank in range(2)],
        "newest": start,
    }


def contents(*folders: Path) -> list[Path]:
    """The files in some folders, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def start(run_dir: Path) -> BaseProcess:
    """Start a trainer of a run."""
    ours, theirs = Pipe()
    process = worker.start(theirs, os.environ, run_dir.with_suffix(".log"))
    ours.send(run_dir)
    ours.close()
    return process


def send(process: BaseProcess, number: int) -> None:
    """Send a process a signal."""
    assert process.pid
    os.kill(process.pid, number)


def exit_code(process: BaseProcess) -> int:
    """How a process ended."""
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def pause_when(process: BaseProcess, true: Callable[[], bool]) -> None:
    """Pause a process in a state that still holds when it stands."""

    def paused() -> bool:
        if true():
            send(process, signal.SIGSTOP)
            if true():
                return True
            send(process, signal.SIGCONT)
        return False

    until(paused, every_s=0.0005)


@pytest.mark.usefixtures("home", "workers")
def test_trainers_that_wake_change_nothing(new_run: Any) -> None:
    """One attempt is paused at a random step, the next in a save, the next in its export; the fourth succeeds."""
    run_dir = new_run("run", train={"steps": 40}, checkpoint={"every": 3}, output={"merge": True})
    enough = random.Random(0).randint(4, 20)

    def at_random() -> bool:
        return last_attempt(run_dir).number == 1 and len(rows(run_dir)) >= enough

    def saving() -> bool:
        return last_attempt(run_dir).number == 2 and any(unfinished_saves(run_dir))

    def exporting() -> bool:
        third = Attempt(run_dir, 3)
        return last_attempt(run_dir) == third and any(third.folder.glob("output*")) and result(run_dir) is None

    ghosts: list[BaseProcess] = []
    try:
        for moment in (at_random, saving, exporting):
            ghosts.append(start(run_dir))
            pause_when(ghosts[-1], moment)
        assert exit_code(start(run_dir)) == 0
        before = readable(run_dir)
        assert (before["result"][1]["attempt"], before["newest"].step) == (4, 40)
        assert [row["step"] for row in before["history"]] == list(range(1, 41))
        for ghost in ghosts:
            send(ghost, signal.SIGCONT)
        assert all(exit_code(ghost) > 0 for ghost in ghosts)
        assert not list(run_dir.glob("attempts/[12]/output"))  # they did not go on to their end
        assert readable(run_dir) == before
    finally:
        for ghost in ghosts:
            ghost.kill()
            ghost.join()


class Machine:
    """A Ray head and one controller, as they are together on a node: paused and woken together."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        folder.mkdir()
        self._head = Head(folder)
        address = until(self._head.keep, every_s=0.2)
        environment = os.environ | self._head.environment() | {"RAY_ADDRESS": address}
        with (folder / "controller.log").open("ab") as log:
            self.controller = subprocess.Popen(
                controller_command(str(run_dir)), env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def signal(self, number: int) -> None:
        """Send all of its processes a signal."""
        leaders = [self.controller.pid, json.loads(self._head.lock.read_text())["pid"]]
        signal_all([pid for leader in leaders for pid in session(leader)], number)

    def end(self) -> None:
        """Kill what is left."""
        self.signal(signal.SIGKILL)
        self.controller.wait()
        self._head.end()


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    """An MLflow server."""
    made = Server(f"sqlite:///{home}/server.db")
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.mark.chaos
def test_a_machine_that_wakes_changes_nothing(server: Server, home: Path, tiny_base: Path, sums: Path) -> None:
    """Controller, driver, workers and Ray stand still in the middle of a delivery, and another machine takes over."""
    proxy = Proxy(server.port, held=b"runs/log-batch")
    proxy.holding = False
    run_dir = make_run(
        home / "runs",
        "ghost-0000000001",
        proxy.uri,
        base=str(tiny_base),
        data={"train": str(sums), "seq_len": 64},
        train={"steps": 600, "batch_tokens": 128, "lr": 1e-3},
        sharding={"zero": 2},
        checkpoint={"every": 3},
        resources={"workers_per_node": 2},
    )
    machines = [Machine(home / "first", run_dir)]
    try:
        until(lambda: (run_dir / "mlflow.json").exists() and delivered(server.uri, run_dir))
        proxy.holding = True
        assert proxy.caught.wait(60)
        machines[0].signal(signal.SIGSTOP)
        proxy.holding = False
        ghost = Attempt(run_dir, 1)
        assert result(run_dir) is None and last_attempt(run_dir) == ghost
        machines.append(Machine(home / "second", run_dir))
        assert machines[1].controller.wait(200) == 0
        before = readable(run_dir)
        assert is_delivered(run_dir)
        assert (before["result"][1]["state"], before["result"][1]["attempt"]) == ("succeeded", 2)

        machines[0].signal(signal.SIGCONT)
        assert machines[0].controller.wait(60) == 1
        until(lambda: not any(map(lives, workers(ghost))))
        assert b"200" in proxy.release()
        assert readable(run_dir) == before
        assert len(attempts(run_dir)) == 2
        assert delivered(server.uri, run_dir) == reported(run_dir)
        assert [step for step, _ in reported(run_dir)] == list(range(1, 601))
        assert mlflow_run(server.uri, run_dir).info.status == "FINISHED"
    finally:
        for machine in machines:
            machine.end()
