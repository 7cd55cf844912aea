"""Whether the nodes of an allocation are there. What listens stands for Ray, and processes that sleep for steps."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from programs import program
from waiting import until

from clusters import allocated_nodes, allocation, ray_node
from clusters.allocated_nodes import AllocatedNodes, KeptNode, end_session
from clusters.controllers import REQUEUE
from clusters.first_node import FirstNode, first_node_here
from clusters.job_start import JobStart
from clusters.ray_head import answers


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AllocatedNodes, list[socket.socket]]]:
    """Two nodes that answer, and what listens at their addresses; they are looked at often."""
    monkeypatch.setattr(allocated_nodes, "_ANSWER_POLL_S", 0.01)
    listeners, kept = [], []
    for name in ("head", "node2"):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        (tmp_path / name).write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        step = subprocess.Popen(["sleep", "60"], start_new_session=True)
        listeners.append(listener)
        kept.append(KeptNode(name, tmp_path, step))
    yield AllocatedNodes(kept), listeners
    for node, listener in zip(kept, listeners, strict=True):
        listener.close()
        end_session(node.process)


Nodes = tuple[AllocatedNodes, list[socket.socket]]


def test_nodes_that_answer_are_there(nodes: Nodes) -> None:
    assert nodes[0].count() == nodes[0].settled_count() == 2


def test_a_node_whose_step_has_ended_is_lost(nodes: Nodes) -> None:
    end_session(nodes[0].nodes[1].process)
    assert nodes[0].count() == nodes[0].settled_count() == 1


def test_a_node_that_does_not_answer_is_lost_after_a_while(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes[1][1].close()
    assert nodes[0].count() == 2
    monkeypatch.setattr(allocated_nodes, "LOST_S", 0.2)
    assert nodes[0].settled_count() == 1


def test_without_the_head_there_is_none(nodes: Nodes) -> None:
    end_session(nodes[0].nodes[0].process)
    assert nodes[0].count() == 0


@pytest.fixture
def two_nodes(tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of two nodes, of which this one is the first; gives the run folder, whose job may lose one."""
    home, run_dir = tmp_path / "home", tmp_path / "home" / "runs" / "sums-0123456789"
    run_dir.mkdir(parents=True)
    job = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}, "resources": {"nodes": "1-2"}}
    (run_dir / "job.yaml").write_text(yaml.safe_dump({"cluster": "hpc", "submitted": 0.0, "job": job}))
    variables = {"FLEETUNE_HOME": str(home), "SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node1"}
    for name, value in (*variables.items(), ("RAY_AUTH_TOKEN_PATH", ""), ("RAY_AUTH_MODE", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocated_nodes, "_CLEAN_UP_S", 0.5)
    program(asked, "scontrol", "echo node1; echo node2")
    program(asked, "squeue", ":")
    return run_dir


def controllers_on(run_dir: Path, python: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """What becomes of a start whose nodes have this command for Ray: and on how many nodes each controller was."""
    counts: list[int] = []

    def run_controller(_run_dir: Path, nodes: AllocatedNodes, *_: object) -> int:
        counts.append(nodes.count())
        return 0

    monkeypatch.setattr(allocation, "run_controller", run_controller)
    with allocated_nodes.allocated_nodes(run_dir, f"{run_dir.name}-s1", python) as nodes:
        start = JobStart(run_dir, 1, 0)
        return allocation.keep_controller(start, nodes, threading.Event(), ["true"]), counts


def test_a_start_on_which_ray_does_not_come_up_goes_back_to_the_queue(
    two_nodes: Path, asked: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program(asked, "srun", "exec sleep 60")
    assert controllers_on(two_nodes, ["false"], monkeypatch) == (REQUEUE, [])
    assert "Ray does not answer on head: what keeps it ended with code 1" in capfd.readouterr().out
    assert f"--nodelist=node2 --export=ALL {allocated_nodes.sys.executable}" in asked.read_text()
    monkeypatch.setattr(allocated_nodes, "_READY_S", 1.0)
    monkeypatch.setattr(allocated_nodes, "LOST_S", 0.0)
    assert controllers_on(two_nodes, ["sleep", "60"], monkeypatch) == (REQUEUE, [])
    assert "Ray does not answer on node2\n" in capfd.readouterr().out


def test_a_node_that_is_lost_as_ray_starts_leaves_the_others(
    two_nodes: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    listens = tmp_path / "listens.py"
    listens.write_text(_LISTENS)
    program(asked, "srun", "exit 0")
    assert controllers_on(two_nodes, ["python3", str(listens)], monkeypatch) == (0, [1])
    assert "Ray does not answer on node2: what keeps it ended with code 0" in capfd.readouterr().out


# In place of Ray's head: it listens where that was told to, as long as what has started it is there.
_LISTENS = """
import os, select, socket, sys
started_by = os.getppid()
told = dict(option.lstrip("-").split("=", 1) for option in sys.argv if "=" in option)
listener = socket.create_server((told["node-ip-address"], int(told["port"])))
while os.getppid() == started_by:
    if select.select([listener], [], [], 0.2)[0]:
        listener.accept()[0].close()
"""


def test_other_nodes_are_started_before_the_first_has_ray(
    two_nodes: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(asked, "srun", f"touch {asked}.node2; exec sleep 60")
    monkeypatch.setattr(allocated_nodes, "_await_nodes", lambda _: until(Path(f"{asked}.node2").exists))
    with allocated_nodes.allocated_nodes(two_nodes, f"{two_nodes.name}-s1", ["sleep", "60"]) as nodes:
        assert [node.name for node in nodes.nodes] == ["head", "node2"]


def test_a_node_has_ray_once_the_head_answers_and_notices_the_loss_of_the_first_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_node, "_NODE_POLL_S", 0.01)
    monkeypatch.setattr(ray_node, "LOST_S", 0.3)
    started: list[subprocess.Popen[bytes]] = []

    def start_ray() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return started[0]

    with first_node_here() as first:
        assert answers(first.keeper) and not answers(first.ray)
        silent = FirstNode("127.0.0.1:1", first.ray)
        assert ray_node.keep(tmp_path, silent, start_ray, is_head=False) is None and not started
        monkeypatch.setattr(ray_node, "LOST_S", -1.0)  # as behind a suspension of the job
        host, _, port = first.ray.rpartition(":")
        with socket.create_server((host, int(port))):
            threading.Timer(1.0, (tmp_path / "here").rmdir).start()
            (tmp_path / "here").mkdir()
            assert ray_node.keep(tmp_path / "here", first, start_ray, is_head=False) is None
    assert len(started) == 1 and started[0].poll() is not None
    assert not answers(first.keeper)


def test_a_node_that_lost_the_first_one_sends_the_job_back(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_node, "LOST_S", 0.1)
    monkeypatch.setattr(ray_node.signal, "pthread_sigmask", lambda *_: None)
    program(asked, "squeue", "echo 'RUNNING|None'")
    program(asked, "scontrol", ":")
    start = JobStart(tmp_path, 1, 0)
    mask = os.umask(0o022)
    try:
        assert ray_node.main(tmp_path, start, FirstNode("127.0.0.1:1", "127.0.0.1:1"), "node2", ["true"]) == 0
    finally:
        os.umask(mask)
    assert "requeue 4" in asked.read_text()


def test_the_memory_of_a_node_is_what_slurm_gave_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert ray_node.node_memory() == 2048 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1024")
    assert ray_node.node_memory() == 1024 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    assert ray_node.node_memory() > 1 << 30
