"""One Ray node of an allocation, while FOLDER is there:

    python -m clusters.ray_node FOLDER RUN_DIR SUBMISSION KEEPER RAY NAME PYTHON...

KEEPER and RAY are the addresses of the first node, PYTHON... is the command of the Python that has Ray, which may be
in a container. Who keeps the allocation removes FOLDER. Where that is lost with its node, at whatever point, the job
goes back to the queue: SLURM keeps a job of several nodes that may lose one, also when that is the first.

SLURM sends SIGTERM to the processes of a step when it preempts a job. Ray would end at once, and with it the workers
that are still to save; so the signal is blocked here and in Ray.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from clusters.allocated_nodes import HEAD, LOST_S
from clusters.first_node import FirstNode, reachable_address
from clusters.job_start import JobStart
from clusters.own_folder import own_folder
from clusters.ray_head import answers
from clusters.ray_start import free_ports, head_options, node_options, ray_command, write_whole
from clusters.requeue import requeue, start_of_this_job

_NODE_POLL_S = 1.0


def main(folder: Path, start: JobStart, first: FirstNode, name: str, python: Sequence[str]) -> int:
    """Keep the Ray node `name`, the head or one that joins it; its address is in `folder`/`name` then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.umask(0o077)
    ip = reachable_address()
    (manager_port,) = free_ports(1, ip)
    with own_folder("ft-ray-") as temporary:
        options = node_options(ip, temporary / "ray") | {"memory": node_memory(), "node-manager-port": manager_port}
        flags = ["--disable-usage-stats"]
        if name == HEAD:
            options |= head_options(ip, int(first.ray.rpartition(":")[2]))
            flags += ["--head", "--no-monitor"]
            address = first.ray
        else:
            options["address"] = first.ray
            address = f"{ip}:{manager_port}"
        write_whole(folder / name, address)
        command = ray_command(options, flags, "clusters.ray_process", python)
        code = keep(folder, first, partial(_start_ray, command), name == HEAD)
    if code is None and folder.exists():
        print("the first node of this job is lost: back to the queue", flush=True)
        return requeue(start)
    return code or 0


def _start_ray(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Ray in a session of its own."""
    return subprocess.Popen(command, start_new_session=True)


def keep(
    folder: Path, first: FirstNode, start_ray: Callable[[], subprocess.Popen[bytes]], is_head: bool
) -> int | None:
    """Have Ray here, once its head answers, until the folder is gone or the first node is lost: None.

    Where it ends before, its exit code.
    """
    ray: subprocess.Popen[bytes] | None = None
    answered_at = time.monotonic()
    try:
        while folder.exists():
            if answers(first.keeper):
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > LOST_S:
                return None
            if ray is None and (is_head or answers(first.ray)):
                ray = start_ray()
            if ray is not None and ray.poll() is not None:
                return ray.returncode
            time.sleep(_NODE_POLL_S)
        return None
    finally:
        if ray is not None:
            with suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)
            ray.wait()


def node_memory() -> int:
    """Bytes that this node may use of the allocation: as SLURM says, else what the machine has."""
    mib = _number_of("SLURM_MEM_PER_NODE") or _number_of("SLURM_MEM_PER_CPU") * _number_of("SLURM_CPUS_ON_NODE")
    if mib:
        return mib << 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number_of(variable: str) -> int:
    """The number that a variable of SLURM has; 0 where it has none."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


if __name__ == "__main__":
    own_start = start_of_this_job(Path(sys.argv[2]), sys.argv[3])
    sys.exit(main(Path(sys.argv[1]), own_start, FirstNode(*sys.argv[4:6]), sys.argv[6], sys.argv[7:]))
