"""The contract of clusters, passed by the local one: of this machine, and of another one over a real sshd."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from contract import NodeContract, QueueContract, RunContract
from local_place import LocalPlace
from place import Place
from ssh_server import WHY_NOT as WHY_NO_SSH
from ssh_server import SshServer, close_far_sides, ssh_server
from ssh_server import can_serve as can_serve_ssh
from trapped import CAN_TRAP, WHY_NOT, trapped_cluster

from clusters.local import Local


def write_clusters(file: Path, name: str, root: Path, **changes: object) -> None:
    """A clusters file with one local cluster."""
    file.write_text(yaml.safe_dump({name: {"kind": "local", "root": str(root), **changes}}))


@pytest.fixture(scope="class")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """The local cluster of this machine."""
    with trapped_cluster(tmp_path_factory) as cluster:
        yield cluster


@pytest.mark.skipif(not CAN_TRAP, reason=WHY_NOT)
class OfThisMachine:
    """With the local cluster of this machine."""

    @pytest.fixture
    def place(self, here: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
        """The cluster, by a name in the clusters file."""
        write_clusters(tmp_path / "clusters.yaml", "here", here.home)
        monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
        return LocalPlace("here", here.home)


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    """A server in a short folder."""
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ssh_server(Path(folder) / "s") as server:
        yield server


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """The local cluster of that server."""
    cluster = Local(tmp_path_factory.mktemp("there"))
    yield cluster
    close_far_sides()
    cluster.stop()


@pytest.mark.skipif(not can_serve_ssh(), reason=WHY_NO_SSH)
class OfAnotherMachine:
    """With the local cluster of another machine."""

    @pytest.fixture
    def place(self, server: SshServer, there: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
        """The cluster, behind an ssh that knows the machine."""
        link = {"link": {"ssh": "there"}, "python": sys.executable}
        write_clusters(tmp_path / "clusters.yaml", "there", there.home, **link)
        monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "laptop"))
        monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
        monkeypatch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")
        return LocalPlace("there", there.home)


class TestQueueHere(OfThisMachine, QueueContract):
    """Runs that wait here."""


class TestRunsHere(OfThisMachine, RunContract):
    """Runs on one worker here."""


@pytest.mark.chaos
class TestNodesHere(OfThisMachine, NodeContract):
    """Runs on all workers here."""


class TestQueueThere(OfAnotherMachine, QueueContract):
    """Runs that wait there."""


@pytest.mark.chaos
class TestRunsThere(OfAnotherMachine, RunContract):
    """Runs on one worker there."""


@pytest.mark.chaos
class TestNodesThere(OfAnotherMachine, NodeContract):
    """Runs on all workers there."""
