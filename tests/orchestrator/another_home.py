"""Clusters whose runs only another process can see: it stands for another machine.

It has another HOME, another FLEETUNE_HOME and another current folder. The process half of the cluster is the local
one of that home.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters.config import SshLink
from clusters.local import LocalConfig
from clusters.remote.cluster import RemoteCluster
from clusters.remote.code import installed_code
from clusters.remote.far_side import FarSide
from clusters.remote.link import ThisHost
from clusters.remote.lock import installed_lock
from clusters.remote.machine import FarMachine


@dataclass(frozen=True)
class AnotherHome(ThisHost):
    """A link to this host as somebody else: with another HOME, in another current folder."""

    folder: Path

    def process(self, command: Sequence[str]) -> list[str]:
        """The command, without what tests set in our environment."""
        return ["env", "-C", str(self.folder), "-u", "FLEETUNE_CACHE", f"HOME={self.folder / 'nobody'}", *command]


class NoRoute(ThisHost):
    """A link that is down."""

    def process(self, command: Sequence[str]) -> list[str]:  # noqa: ARG002
        """What ssh does where nobody answers."""
        return ["sh", "-c", "echo no route >&2; exit 255"]


def far_cluster(name: str, link: ThisHost, root: Path) -> RemoteCluster:
    """The cluster of a FLEETUNE_HOME behind a link."""
    config = LocalConfig(kind="local", link=SshLink(ssh=name), root=str(root), python=sys.executable)
    return RemoteCluster(FarSide(FarMachine(name, link, config, installed_code(), installed_lock())))
