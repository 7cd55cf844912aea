"""What a batch job runs on its first node: `python -m clusters.allocation RUN_DIR NAME`.

It starts Ray on every node of the allocation, and the controller until the run has its result. A warning is passed to
the controller, which has the trainer save; then the job goes back to the queue. One job carries as many attempts as
that takes.

Of two jobs of one submission, the one whose id is in RUN_DIR/submissions/NAME works. Of two starts of a run (a node
that was cut off lives on while its job was requeued, or the run was submitted again) the later one works: each leaves
its name in RUN_DIR/starts.
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

from clusters.controllers import COLLECTED, REQUEUE, REQUEUED, controller_command
from clusters.ray_head import Backoff, answers
from clusters.ray_start import ray_environment, write_token
from runfolder.chain import result
from runfolder.files import list_names, refresh

_RAY_S = 300.0  # until a node's Ray answers
_NODES_S = 20.0  # until nodes whose work is done have cleaned up
_ALLOCATION_POLL_S = 0.2
_TERM_CAME = 64
_AWAIT_TERM = f"trap 'exit {_TERM_CAME}' TERM; while :; do sleep 3600 & wait $!; done"


def main(run_dir: Path, name: str) -> int:
    """Take the run as far as this allocation lasts; gives the exit code of the job."""
    job_id = os.environ["SLURM_JOB_ID"]
    if not claim(run_dir, name, job_id):
        print(f"another job has the submission {name}; nothing to do", flush=True)
        return 0
    start = JobStart.of_this_job(run_dir, name)
    start.note()
    told = threading.Event()
    with warnings(told), ray_nodes() as nodes:
        code = keep_controller(start, nodes, told)
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


@dataclass(frozen=True)
class JobStart:
    """One start of a batch job of a run: by its submission, and by how often its job was requeued."""

    run_dir: Path
    submission: int
    requeues: int

    @staticmethod
    def of_this_job(run_dir: Path, name: str) -> "JobStart":
        """The start that this process is."""
        number = name.rpartition("-s")[2]
        return JobStart(run_dir, int(number), int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def note(self) -> None:
        """Let earlier starts, which may live on, know of this one."""
        folder = self.run_dir / "starts"
        folder.mkdir(exist_ok=True)
        (folder / f"{self.submission}.{self.requeues}").touch()

    def is_latest(self) -> bool:
        """Whether the run was not started again since."""
        folder = self.run_dir / "starts"
        refresh(folder)
        for name in list_names(folder):
            submission, _, requeues = name.partition(".")
            if submission.isdigit() and (int(submission), int(requeues)) > (self.submission, self.requeues):
                return False
        return True


@contextmanager
def warnings(told: threading.Event) -> Iterator[None]:
    """Set the event when SLURM says that the end is near, while the block runs.

    That is SIGUSR1 to this process, before the walltime and, where the site has preempt_send_user_signal, at a
    preemption. Elsewhere a preemption sends SIGTERM to the steps of the job alone: one of them waits for that.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    here = f"--nodelist={os.environ['SLURMD_NODENAME']}"
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", here, "--export=NONE", "bash", "-c", _AWAIT_TERM]
    waiting = subprocess.Popen(step, start_new_session=True, stdin=subprocess.DEVNULL)

    def watch() -> None:
        if waiting.wait() == _TERM_CAME:
            told.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        end_session(waiting)


@dataclass
class RayNodes:
    """Ray's nodes: the address of their head, and the processes that keep them, the head's first."""

    address: str
    processes: list[subprocess.Popen[bytes]]

    def are_whole(self) -> bool:
        """Whether no node was lost."""
        return answers(self.address) and all(process.poll() is None for process in self.processes)


def keep_controller(start: JobStart, nodes: RayNodes, told: threading.Event) -> int:
    """Start the controller until the run has its result, or cannot go on here; gives 0 or REQUEUE."""
    backoff = Backoff()
    environment = os.environ | {"RAY_ADDRESS": nodes.address} | REQUEUED | COLLECTED
    while start.is_latest():
        while not backoff.ready():
            time.sleep(_ALLOCATION_POLL_S)
        backoff.began()
        code = run_controller(start.run_dir, environment, told)
        if code == 0 or result(start.run_dir) is not None:
            return 0
        if start.is_latest() and (code == REQUEUE or told.is_set() or not nodes.are_whole()):
            return REQUEUE
    print("the run was started again elsewhere; nothing to do", flush=True)
    return 0


def run_controller(run_dir: Path, environment: dict[str, str], told: threading.Event) -> int:
    """Run the controller once; a warning is passed to it, once. Gives its exit code."""
    command = controller_command(str(run_dir))
    controller = subprocess.Popen(command, env=environment, start_new_session=True)
    is_told = False
    while controller.poll() is None:
        if told.is_set() and not is_told:
            controller.send_signal(signal.SIGTERM)
            is_told = True
        time.sleep(_ALLOCATION_POLL_S)
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
        shutil.rmtree(folder, ignore_errors=True)  # by which the nodes see that their work is done
        deadline = time.monotonic() + _NODES_S
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(_ALLOCATION_POLL_S)
        for process in processes:
            end_session(process)


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
        time.sleep(_ALLOCATION_POLL_S)
    raise RuntimeError(f"Ray's head does not answer after {_RAY_S:.0f} s")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
