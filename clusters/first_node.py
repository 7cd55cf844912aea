"""The first node of an allocation, as its other nodes see it: a port that they know from their first second on.

Who keeps the allocation listens there as long as it lives. Ray's head comes up later, and may go before.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

from clusters.ray_start import free_ports


@dataclass(frozen=True)
class FirstNode:
    """Addresses host:port on the first node: of who keeps the allocation, and of Ray's head once that is up."""

    keeper: str
    ray: str


@contextmanager
def first_node_here() -> Iterator[FirstNode]:
    """This node as the first one, which answers the others while the block runs; raises SystemExit."""
    ip = reachable_address()
    (ray_port,) = free_ports(1, ip)
    with socket.create_server((ip, 0), backlog=1000) as listener:
        threading.Thread(target=_accept, args=[listener], daemon=True).start()
        try:
            yield FirstNode(f"{ip}:{listener.getsockname()[1]}", f"{ip}:{ray_port}")
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # which ends the thread


def reachable_address() -> str:
    """The address of this node that others reach it at: the one that its host name has.

    Raises SystemExit for a node of several with an address for itself alone, as Debian's /etc/hosts has it.
    """
    node = socket.gethostname()
    address = socket.gethostbyname(node)
    if ip_address(address).is_loopback and os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        problem = f"{node}: found {address} as its address, where no other node reaches it"
        raise SystemExit(f"{problem}: have the site put the one that others know into /etc/hosts")
    return address


def _accept(listener: socket.socket) -> None:
    """Let go of all who connect: that somebody is here is all that they want to know."""
    with suppress(OSError):  # until nobody listens any more
        while True:
            connection, _ = listener.accept()
            connection.close()
