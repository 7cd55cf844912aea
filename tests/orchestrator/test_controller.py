"""The whole way from a submission to a result, on a local cluster with real Ray, and what may happen on it."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import waiting
from trapped import CAN_TRAP, WHY_NOT, trapped_cluster

import fleetune
from clusters import process
from clusters.local import Local
from orchestrator.submit import submit
from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts, last_attempt, result
from runfolder.files import Record
from trainer.checkpoint.lineage import finished, step_of

pytestmark = [
    pytest.mark.skipif(not CAN_TRAP, reason=WHY_NOT),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A local cluster with room for two workers."""
    with trapped_cluster(tmp_path_factory) as cluster:
        yield cluster


@pytest.fixture
def start(cluster: Local, tiny_base: Path, sums: Path) -> Callable[..., Path]:
    """Submit a small job; gives its run folder."""

    def make(**parts: Any) -> Path:
        assert cluster.home == Path(os.environ["FLEETUNE_HOME"])
        job = {
            "name": "small",
            "base": str(tiny_base),
            "method": {"kind": "lora", "rank": 4},
            "data": {"train": str(sums), "seq_len": 64},
            "train": {"steps": 20, "batch_tokens": 512, "lr": 1e-2},
            "checkpoint": {"every": 10},
            "resources": {"workers_per_node": 1},
            **parts,
        }
        return submit(job).run_dir

    return make


def until(true: Callable[[], Any], timeout_s: float = 400) -> Any:
    return waiting.until(true, timeout_s)


def ended(run_dir: Path) -> Record:
    found: Record = until(lambda: result(run_dir))
    return found


def saved(run_dir: Path, number: int) -> bool:
    """Whether this attempt has a checkpoint of its own, beside the one that it started from."""
    attempt = Attempt(run_dir, number)
    if not attempt.folder.exists():
        return False
    start = attempt.start.step if attempt.start else 0
    return any(step_of(checkpoint) > start for checkpoint in finished(attempt))


def workers(run_dir: Path, number: int) -> list[int]:
    """Process ids of an attempt's workers by rank, as the heads of their logs tell them."""
    logs = sorted((Attempt(run_dir, number).folder / "logs").glob("rank-*.log"))
    return [int(found[1]) for log in logs if (found := re.match(r"\[rank \d+\] pid (\d+) on", log.read_text()))]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def kill(pid: int | None) -> None:
    assert pid
    os.kill(pid, signal.SIGKILL)


@pytest.mark.chaos  # each kind of kill by itself; tests/chaos covers them in make test
def test_a_run_goes_on_whatever_is_killed(cluster: Local, start: Callable[..., Path]) -> None:
    """Worker, supervisor, controller, head: one after another, and each step counts once in the end."""
    run_dir = start(train={"steps": 300, "batch_tokens": 512, "lr": 1e-3}, resources={"workers_per_node": 2})
    name = run_dir.name

    until(lambda: saved(run_dir, 1))
    kill(workers(run_dir, 1)[1])
    verdict = until(lambda: Attempt(run_dir, 1).verdict)
    assert (verdict["kind"], verdict["rank"]) == ("node_lost", 1)

    until(lambda: saved(run_dir, 2))
    controller = cluster.state()["controllers"][name]
    kill(cluster.state()["supervisor"])
    until(lambda: process.owner(cluster.supervisor_lock) is None)
    cluster.start()
    until(lambda: cluster.state()["supervisor"])
    time.sleep(1.5)
    assert cluster.state()["controllers"] == {name: controller}

    before = workers(run_dir, 2)
    kill(controller)
    until(lambda: process.owner(cluster.controller_lock(name)) != controller)
    states = []
    while last_attempt(run_dir).number == 2:
        states.append(fleetune.status(name).state)
    assert "preempted" in states and "running" not in states, "nobody leads the run"
    until(lambda: not any(map(lives, before)), 60)
    until(lambda: saved(run_dir, 3))
    assert Attempt(run_dir, 2).verdict is None

    before = workers(run_dir, 3)
    kill(cluster.state()["head"])
    until(lambda: not any(map(lives, before)), 60)
    assert until(lambda: Attempt(run_dir, 3).verdict, 60)["kind"] == "node_lost"

    assert ended(run_dir)["state"] == "succeeded"
    assert [attempt.number for attempt in attempts(run_dir)] == [1, 2, 3, 4]
    assert all(attempt.start for attempt in attempts(run_dir)[1:])
    assert {row["step"] for a in attempts(run_dir) for row in read_lines(a, "metrics.jsonl")} == set(range(1, 301))
    assert (run_dir / "output" / "adapter_model.safetensors").exists()


@pytest.mark.chaos
def test_stop_leaves_no_process_behind_and_start_goes_on(cluster: Local, start: Callable[..., Path]) -> None:
    run_dir = start()
    until(lambda: cluster.status([run_dir.name])[run_dir.name].state == "running")
    state = cluster.state()
    leaders = {state["supervisor"], state["head"], *state["controllers"].values()}
    mine = [p.pid for p in psutil.process_iter() if lives(p.pid) and os.getsid(p.pid) in leaders]
    assert len(mine) > len(leaders)
    cluster.stop()
    assert [pid for pid in mine if lives(pid)] == []
    assert cluster.status([run_dir.name])[run_dir.name].state == "queued"
    cluster.start()
    assert ended(run_dir)["state"] == "succeeded"
