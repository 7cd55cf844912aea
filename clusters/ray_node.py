"""One Ray node of an allocation, `python -m clusters.ray_node FOLDER RUN_DIR SUBMISSION NAME PYTHON...`, while FOLDER
is there. PYTHON... is the command of the Python that has Ray, which may be in a container.

SLURM sends SIGTERM to the processes of a step when it preempts a job. Ray would end at once, and with it the workers
that are still to save; so the signal is blocked here and in Ray. Who keeps the allocation removes FOLDER.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from clusters.allocated_nodes import HEAD, LOST_S
from clusters.job_start import JobStart
from clusters.own_folder import own_folder
from clusters.ray_head import answers
from clusters.ray_start import free_ports, head_options, node_options, ray_command, write_whole
from clusters.requeue import requeue, start_of_this_job

_NODE_POLL_S = 1.0


def main(folder: Path, start: JobStart, name: str, python: Sequence[str]) -> int:
    """Keep the Ray node `name`, the head or one that joins it; its address is in `folder`/`name` then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.umask(0o077)
    ip = own_address()
    require_reachable(ip)
    port, manager_port = free_ports(2, ip)
    with own_folder("ft-ray-") as temporary:
        options = node_options(ip, temporary / "ray") | {"memory": node_memory(), "node-manager-port": manager_port}
        flags = ["--disable-usage-stats"]
        if name == HEAD:
            options |= head_options(ip, port)
            flags += ["--head", "--no-monitor"]
            write_whole(folder / name, f"{ip}:{port}")
        else:
            options["address"] = (folder / HEAD).read_text()
            write_whole(folder / name, f"{ip}:{manager_port}")
        command = ray_command(options, flags, "clusters.ray_process", python)
        ray = subprocess.Popen(command, start_new_session=True)
        try:
            keep(ray, folder, start)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)
        return ray.wait()


def keep(ray: subprocess.Popen[bytes], folder: Path, start: JobStart) -> None:
    """Wait until Ray ends, or the folder is gone; where its head is lost, send the job back to the queue."""
    answered_at = time.monotonic()
    address = (folder / HEAD).read_text()
    while ray.poll() is None and folder.exists():
        if answers(address):
            answered_at = time.monotonic()
        elif time.monotonic() - answered_at > LOST_S:
            break
        time.sleep(_NODE_POLL_S)
    if folder.exists() and not answers(address):
        print("the head of this job is lost: back to the queue", flush=True)
        requeue(start)


def own_address() -> str:
    """The address of this node that others reach it at: the one that its host name has."""
    return socket.gethostbyname(socket.gethostname())


def require_reachable(address: str) -> None:
    """Raise SystemExit for a node of several with an address for itself alone, as Debian's /etc/hosts has it."""
    if ip_address(address).is_loopback and os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        node = socket.gethostname()
        problem = f"{node}: found {address} as its address, where no other node reaches it"
        raise SystemExit(f"{problem}: have the site put the one that others know into /etc/hosts")


def node_memory() -> int:
    """Bytes that this node may use of the allocation: as SLURM says, else what the machine has."""
    per_node = os.environ.get("SLURM_MEM_PER_NODE")
    if per_node and per_node.isdigit() and int(per_node):
        return int(per_node) << 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    own_start = start_of_this_job(Path(sys.argv[2]), sys.argv[3])
    sys.exit(main(Path(sys.argv[1]), own_start, sys.argv[4], sys.argv[5:]))
