"""Ray on all nodes of an allocation, as its first node keeps it: `clusters.ray_node` on each, by a step of its own.

All start at once: from then on each sees to it that the first one is not lost (`clusters.ray_node`). A folder that
they share has the address of each. A node is lost when its step has ended, or nobody answers at its address for some
time: SLURM itself may take minutes to notice.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from clusters.first_node import first_node_here
from clusters.node_folder import make_node_folder
from clusters.ray_head import answers
from clusters.ray_start import ray_environment, write_token
from clusters.slurm_commands import ask_slurm

HEAD = "head"
LOST_S = 20.0  # a node that does not answer for so long is lost
_ANSWER_POLL_S = 2.0  # between two looks at whether a node answers
_READY_S = 300.0  # until all nodes answer, or the run goes on without those that do not
_CLEAN_UP_S = 20.0  # that nodes whose work is done have to clean up


@dataclass
class KeptNode:
    """A node of the allocation: the process that keeps its Ray, here or by a step, and when it last answered."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    _answered_at: float = field(default_factory=time.monotonic)
    _looked_at: float = 0.0

    def address(self) -> str | None:
        """Where its Ray listens, as it has written down; None before that."""
        with suppress(FileNotFoundError):
            return (self.folder / self.name).read_text()
        return None

    def answers_now(self) -> bool:
        """Whether its Ray answers."""
        address = self.address()
        answered = self.process.poll() is None and address is not None and answers(address)
        if answered:
            self._answered_at = time.monotonic()
        return answered

    def unanswered_s(self) -> float:
        """For how long it has not answered; infinite where it has ended."""
        if self.process.poll() is not None:
            return float("inf")
        if time.monotonic() - self._looked_at >= _ANSWER_POLL_S:
            self._looked_at = time.monotonic()
            self.answers_now()
        return max(0.0, self._looked_at - self._answered_at)


@dataclass(frozen=True)
class AllocatedNodes:
    """The nodes, the head first."""

    nodes: list[KeptNode]

    @property
    def address(self) -> str:
        """Where Ray's head listens."""
        address = self.nodes[0].address()
        assert address
        return address

    def count(self) -> int:
        """How many nodes are not lost; none without the head."""
        head, *others = self.nodes
        if head.unanswered_s() > LOST_S:
            return 0
        return 1 + sum(node.unanswered_s() <= LOST_S for node in others)

    def settled_count(self) -> int:
        """How many are not lost, once each either answers or is."""
        while any(0 < node.unanswered_s() <= LOST_S for node in self.nodes):
            time.sleep(_ANSWER_POLL_S)
        return self.count()


@contextmanager
def allocated_nodes(run_dir: Path, submission: str, python: Sequence[str]) -> Iterator[AllocatedNodes]:
    """Ray on all nodes of this job's allocation while the block runs, for a submission of a run.

    `python` is the command of the Python that has Ray. Nodes where it does not start are lost ones. Raises SystemExit
    where other nodes cannot reach this one.
    """
    with first_node_here() as first:
        folder = make_node_folder(Path(os.environ["FLEETUNE_HOME"]))
        token = folder / "token"
        write_token(token)
        os.environ.update(ray_environment(token))
        command = [sys.executable, "-P", "-m", "clusters.ray_node", str(folder), str(run_dir), submission]
        command += [first.keeper, first.ray]
        nodes = []
        try:
            for name in _other_names():
                step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={name}", "--export=ALL"]
                nodes.append(_start_node(folder, name, [*step, *command, name, *python]))
            nodes.insert(0, _start_node(folder, HEAD, [*command, HEAD, *python]))
            _await_nodes(nodes)
            yield AllocatedNodes(nodes)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # by which the nodes see that their work is done
            deadline = time.monotonic() + _CLEAN_UP_S
            while time.monotonic() < deadline and any(node.process.poll() is None for node in nodes):
                time.sleep(0.2)
            for node in nodes:
                end_session(node.process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _other_names() -> list[str]:
    """The names of the allocation's nodes but this one, the first."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    said = ask_slurm(["scontrol", "show", "hostnames", nodes])
    names = said.split()
    here = os.environ["SLURMD_NODENAME"]
    return [name for name in names if name != here]


def _start_node(folder: Path, name: str, command: Sequence[str]) -> KeptNode:
    """Start what keeps a node's Ray, here or by a step on that node."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, start_new_session=True, stdin=quiet)
    return KeptNode(name, folder, process)


def _await_nodes(nodes: list[KeptNode]) -> None:
    """Wait until each has answered or ended, the head first; say which do not answer."""
    deadline = time.monotonic() + _READY_S
    waiting = nodes
    head = nodes[0]
    while waiting and head.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        alive = [node for node in waiting if node.process.poll() is None]
        waiting = [node for node in alive if not node.answers_now()]
    for node in nodes:
        if node.answers_now():
            continue
        code = node.process.poll()
        end = "" if code is None else f": what keeps it ended with code {code}"
        print(f"Ray does not answer on {node.name}{end}", flush=True)
