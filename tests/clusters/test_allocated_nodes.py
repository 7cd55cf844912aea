"""Whether the nodes of an allocation are there. What listens stands for Ray, and processes that sleep for steps."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import allocated_nodes
from clusters.allocated_nodes import AllocatedNodes, KeptNode, end_session


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
