"""One Ray node of an allocation: `python -m clusters.ray_node FOLDER ADDRESS|head`, until it is killed.

SLURM sends SIGTERM to the processes of a step when it preempts a job. Ray would end at once, and with it the workers
that are still to save; so the signal is blocked in what starts here. Who keeps the allocation ends it, or SLURM does
by SIGKILL when the grace time is over.
"""

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from clusters.ray_start import free_ports, head_options, node_options, ray_command, write_whole


def main(folder: Path, address: str) -> None:
    """Become the Ray node: a head that writes its address into `folder`/address, or one that joins an address."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.umask(0o077)
    temporary = tempfile.mkdtemp(prefix="ft-ray-", dir="/tmp")  # short: sockets lie in it
    ip = own_address()
    options = node_options(ip, Path(temporary)) | {"memory": node_memory()}
    flags = ["--disable-usage-stats"]
    if address == "head":
        (port,) = free_ports(1, ip)
        options |= head_options(ip, port)
        flags += ["--head", "--no-monitor"]
        write_whole(folder / "address", f"{ip}:{port}")
    else:
        options["address"] = address
    os.execv(sys.executable, ray_command(options, flags))


def own_address() -> str:
    """The address of this node that others reach it at: the one that its host name has."""
    return socket.gethostbyname(socket.gethostname())


def node_memory() -> int:
    """Bytes that this node may use of the allocation: as SLURM says, else what the machine has."""
    per_node = os.environ.get("SLURM_MEM_PER_NODE")
    if per_node and per_node.isdigit() and int(per_node):
        return int(per_node) << 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
