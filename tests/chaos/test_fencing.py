"""An attempt that was paused and wakes after a newer one began changes nothing that anybody reads."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Proxy, Server, free_port
from run_folders import make_run
from scene import delivered, lives, mlflow_run, reported, rows, session, signal_all, unfinished_saves, until, workers

from clusters.local import controller_command
from clusters.ray_head import Head
from orchestrator.history import history
from orchestrator.logs import LogReader
from orchestrator.tracking import is_tracked
from trainer.attempt import Attempt, attempts, last, result
from trainer.checkpoint import newest


def readable(run_dir: Path) -> dict[str, Any]:
    """All that readers of a run see."""
    start = newest(run_dir)
    assert start
    checkpoint = run_dir / "attempts" / str(start.attempt) / "checkpoints" / f"step-{start.step}"
    return {
        "files": {path: path.read_bytes() for path in contents(run_dir / "output", checkpoint)},
        "result": ((run_dir / "result.json").read_bytes(), result(run_dir)),
        "history": history(run_dir),
        "logs": [LogReader(run_dir, rank).read(final=True) for rank in range(2)],
        "newest": start,
    }


def contents(*folders: Path) -> list[Path]:
    """The files in some folders, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


class Trainers:
    """An attempt as two plain processes, which are paused and woken together."""

    def __init__(self, run_dir: Path) -> None:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "trainer", str(run_dir)]
        with (run_dir.parent / "trainers.log").open("ab") as log:
            self._processes = [
                subprocess.Popen(command, env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}, stderr=log)
                for rank in ("0", "1")
            ]

    def signal(self, number: int) -> None:
        """Send all of them a signal."""
        signal_all([process.pid for process in self._processes if process.poll() is None], number)

    def pause_when(self, true: Callable[[], bool]) -> None:
        """Pause them in a state that still holds when they stand."""

        def paused() -> bool:
            if true():
                self.signal(signal.SIGSTOP)
                if true():
                    return True
                self.signal(signal.SIGCONT)
            return False

        until(paused, every_s=0.0005)

    def ended(self, timeout_s: float = 120) -> list[int]:
        """Wait for their own end; gives the exit codes."""
        return [process.wait(timeout_s) for process in self._processes]


@pytest.mark.usefixtures("home")
def test_trainers_that_wake_change_nothing(new_run: Any) -> None:
    """One attempt is paused at a random step, the next in a save, the next in its export; the fourth succeeds."""
    run_dir = new_run(
        "run",
        train={"steps": 40},
        sharding={"zero": 2},
        checkpoint={"every": 3},
        output={"merge": True},
        resources={"workers_per_node": 2},
    )
    rng = random.Random(0)
    enough = rng.randint(4, 20)

    def at_random() -> bool:
        return last(run_dir).number == 1 and len(rows(run_dir)) >= enough

    def saving() -> bool:
        return last(run_dir).number == 2 and any(unfinished_saves(run_dir))

    def exporting() -> bool:
        made = (last(run_dir).folder.glob("output*")) if last(run_dir).number == 3 else ()
        return any(made) and result(run_dir) is None

    ghosts = []
    try:
        for moment in (at_random, saving, exporting):
            ghosts.append(Trainers(run_dir))
            ghosts[-1].pause_when(moment)
        successor = Trainers(run_dir)
        ghosts.append(successor)
        assert successor.ended() == [0, 0]
        before = readable(run_dir)
        assert (before["result"][1]["attempt"], before["newest"].step) == (4, 40)
        assert [row["step"] for row in before["history"]] == list(range(1, 41))
        for ghost in ghosts:
            ghost.signal(signal.SIGCONT)
        for ghost in ghosts[:3]:
            assert ghost.ended()[0] > 0
        assert readable(run_dir) == before
    finally:
        for ghost in ghosts:
            ghost.signal(signal.SIGKILL)
        print((run_dir.parent / "trainers.log").read_text()[-5000:])


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
        leaders = [self.controller.pid, int(self._head.lock.read_text())]
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
        assert result(run_dir) is None and last(run_dir) == ghost
        machines.append(Machine(home / "second", run_dir))
        assert machines[1].controller.wait(200) == 0
        before = readable(run_dir)
        assert is_tracked(run_dir)
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
