"""How a service on a cluster is reached from this machine."""

import shlex

from clusters.config import SshLink
from orchestrator.backends import config_of
from orchestrator.errors import InputError

LAPTOP_PORT = 8000


def forwarding(cluster: str, address: str) -> str:
    """The command that brings a service's address to this machine's port 8000; its own one where none is needed.

    The login node reaches what its nodes listen on, and OpenSSH brings it here.
    """
    try:
        config = config_of(cluster)
    except InputError:  # the cluster of this machine, or one that the clusters file has no more
        return address
    if not isinstance(config.link, SshLink):
        return address
    place = address.removeprefix("http://")
    destination = shlex.quote(config.link.ssh)
    return f"ssh -N -L {LAPTOP_PORT}:{place} {destination}    # then http://127.0.0.1:{LAPTOP_PORT}"
