"""What a batch job runs on its first node: `python -m clusters.allocation RUN_DIR NAME`.

It starts Ray on every node of the allocation, and the controller until the run has its result. A warning (SIGUSR1
before the walltime, SIGTERM at a preemption) is passed to the controller, which has the trainer save; then the job
goes back to the queue. One job carries as many attempts as that takes. Of two jobs of one submission one works: the
one whose id is in RUN_DIR/submissions/NAME.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clusters.controllers import REQUEUE, REQUEUED, controller_command
from clusters.ray_head import Backoff, answers
from clusters.ray_start import ray_environment, write_token
from runfolder.chain import result

_RAY_S = 300.0  # until a node's Ray answers
_POLL_S = 0.2


def main(run_dir: Path, name: str) -> int:
    """Take the run as far as this allocation lasts; gives the exit code of the job."""
    job_id = os.environ["SLURM_JOB_ID"]
    if not claim(run_dir, name, job_id):
        print(f"another job has the submission {name}; nothing to do", flush=True)
        return 0
    told = threading.Event()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    with ray_nodes() as nodes:
        code = keep_controller(run_dir, nodes, told)
    if code == REQUEUE:
        print("back to the queue", flush=True)
        subprocess.run(["scontrol", "requeue", job_id], check=False)
        return 0
    return code


def claim(run_dir: Path, name: str, job_id: str) -> bool:
    """Take a submission for a job; whether it has it, then or before (a requeued job keeps its id)."""
    path = run_dir / "submissions" / name
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("x") as stream:
            stream.write(job_id)
            stream.flush()
            os.fsync(stream.fileno())
        return True
    except FileExistsError:
        return path.read_text() in ("", job_id)


@dataclass
class RayNodes:
    """Ray's nodes: the address of their head, and the processes that keep them, the head's first."""

    address: str
    processes: list[subprocess.Popen[bytes]]

    def are_whole(self) -> bool:
        """Whether no node was lost."""
        return answers(self.address) and all(process.poll() is None for process in self.processes)


def keep_controller(run_dir: Path, nodes: RayNodes, told: threading.Event) -> int:
    """Start the controller until the run has its result, or cannot go on here; gives its last exit code."""
    backoff = Backoff()
    environment = os.environ | {"RAY_ADDRESS": nodes.address} | REQUEUED
    while True:
        while not backoff.ready():
            time.sleep(_POLL_S)
        backoff.began()
        code = run_controller(run_dir, environment, told)
        if code in (0, REQUEUE):
            return code
        if result(run_dir) is not None:
            return 0
        if told.is_set() or not nodes.are_whole():
            return REQUEUE


def run_controller(run_dir: Path, environment: dict[str, str], told: threading.Event) -> int:
    """Run the controller once; a warning is passed to it, once. Gives its exit code."""
    command = controller_command(str(run_dir))
    controller = subprocess.Popen(command, env=environment, start_new_session=True)
    is_told = False
    while controller.poll() is None:
        if told.is_set() and not is_told:
            controller.send_signal(signal.SIGTERM)
            is_told = True
        time.sleep(_POLL_S)
    return controller.returncode


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """Ray on all nodes of the allocation while the block runs."""
    folder = Path(tempfile.mkdtemp(prefix=".ray-", dir=os.environ["FLEETUNE_HOME"]))
    token = folder / "token"
    write_token(token)
    os.environ.update(ray_environment(token))
    processes = []
    try:
        processes.append(start_node(folder, "head", []))
        address = await_head(folder, processes[0])
        others = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) - 1
        if others:
            step = ["srun", "--overlap", f"--nodes={others}", f"--ntasks={others}", "--ntasks-per-node=1"]
            step += [f"--exclude={os.environ['SLURMD_NODENAME']}", "--kill-on-bad-exit=0", "--export=ALL"]
            processes.append(start_node(folder, address, step))
        yield RayNodes(address, processes)
    finally:
        for process in processes:
            end_session(process)
        shutil.rmtree(folder, ignore_errors=True)


def start_node(folder: Path, address: str, step: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Ray here, or by a step on the other nodes."""
    command = [*step, sys.executable, "-P", "-m", "clusters.ray_node", str(folder), address]
    return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)


def await_head(folder: Path, head: subprocess.Popen[bytes]) -> str:
    """The head's address, once it answers; raises RuntimeError where it ends, or takes too long."""
    deadline = time.monotonic() + _RAY_S
    path = folder / "address"
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise RuntimeError(f"Ray's head ended with code {head.returncode}")
        if path.exists() and answers(path.read_text()):
            return path.read_text()
        time.sleep(_POLL_S)
    raise RuntimeError(f"Ray's head does not answer after {_RAY_S:.0f} s")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
