"""What a batch job runs on its first node: `python -m clusters.allocation RUN_DIR NAME [PYTHON...]`.

It starts Ray on every node of the allocation, and the controller until the run has its result. A warning is passed to
the controller, which has the trainer save; then the job goes back to the queue. One job carries as many attempts as
that takes. PYTHON... is the command of the Python that has Ray and trains, where that is in a container.

Of two jobs of one submission, the one whose id is in RUN_DIR/submissions/NAME works; of two starts of a run, the
later one (`JobStart`).
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
from pathlib import Path

from clusters.allocated_nodes import AllocatedNodes, allocated_nodes, end_session
from clusters.controllers import COLLECTED, REQUEUE, REQUEUED, controller_command, on_nodes, until_moment
from clusters.job_start import JobStart
from clusters.node_folder import remove_folders_of_job
from clusters.own_folder import own_folder
from clusters.probe import probe
from clusters.ray_head import Backoff
from clusters.requeue import requeue, start_of_this_job
from clusters.slurm_answers import seconds_of
from clusters.slurm_environment import slurm_environment
from clusters.slurm_walltime import warning_s
from runfolder.chain import last_slot, result
from runfolder.files import list_names, sync_folder
from runfolder.latest_start import note_latest_start
from runfolder.record import load_any_job

_NODE_LOSS_S = 30.0  # that a controller has to notice the loss of a node
_ALLOCATION_POLL_S = 0.2
_TERM_CAME = 64
_AWAIT_TERM = f"trap 'kill $!; exit {_TERM_CAME}' TERM; cat \"$0\" & wait $!"  # until nobody holds its pipe
_END_QUESTION_S = 10.0  # for SLURM to say when this job ends
_FRUITLESS_STARTS = 5  # in a row, until somebody has to look
_FRUITLESS_CONTROLLERS = 5  # in a row, until others get the nodes
_STEP_END_S = 10.0  # until that step has ended


def main(run_dir: Path, name: str, python: Sequence[str]) -> int:
    """Take the run as far as this allocation lasts; gives the exit code of the job."""
    job_id = os.environ["SLURM_JOB_ID"]
    start = start_of_this_job(run_dir, name)
    try:
        if not claim(run_dir, name, job_id):
            print(f"another job has the submission {name}; nothing to do", flush=True)
            return 0
        start.note()
        fruitless = start.fruitless()
    except OSError as error:
        print(f"the run folder cannot be used: {error}", flush=True)
        return 1
    if fruitless >= _FRUITLESS_STARTS:
        todo = f"what they printed is above; then: fleetune resume {run_dir.name}"
        print(f"{fruitless} starts in a row made no attempt at the run: {todo}", flush=True)
        return 1
    told = threading.Event()
    before_end_s = warning_s(load_any_job(run_dir))
    with warnings(told, before_end_s), allocated_nodes(run_dir, name, python) as nodes:
        code = keep_controller(start, nodes, told, controller_command(str(run_dir), python))
        if code == REQUEUE:
            print("back to the queue", flush=True)
            # Where this node is cut off, the others do, who have lost it: they must still be there.
            return requeue(start)
    if start.is_latest():
        remove_folders_of_job(Path(os.environ["FLEETUNE_HOME"]), job_id)
    return code


def claim(run_dir: Path, name: str, job_id: str) -> bool:
    """Take a submission for a job; whether it has it, then or before (a requeued job keeps its id)."""
    taken = run_dir / "submissions" / name
    taken.parent.mkdir(exist_ok=True)
    prepared = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=taken.parent))
    (prepared / job_id).touch()
    try:
        prepared.rename(taken)  # with the id in it, so that nobody finds it taken by nobody
    except OSError:
        shutil.rmtree(prepared)
        if not list_names(taken):
            raise
    sync_folder(taken.parent)
    return list_names(taken) == [job_id]


@contextmanager
def warnings(told: threading.Event, before_end_s: float) -> Iterator[None]:
    """Set the event when SLURM says that the end is near, while the block runs, or when it is by SLURM's own plan.

    What SLURM says before this process listens is lost. It says it by SIGUSR1 to this process, before the walltime
    and, where the site has preempt_send_user_signal, at a preemption. Elsewhere a preemption sends SIGTERM to the
    steps of the job alone: one of them waits for that.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    left_s = seconds_left()
    os.environ.update(until_moment(time.time() + left_s))  # by which the controller knows what it is told for
    timer = threading.Timer(max(0.0, left_s - before_end_s), told.set)
    timer.daemon = True
    timer.start()
    try:
        with own_folder("ft-warned-") as folder, step_that_awaits_term(folder / "pipe", told):
            yield
    finally:
        timer.cancel()


@contextmanager
def step_that_awaits_term(pipe: Path, told: threading.Event) -> Iterator[None]:
    """A step of this job that waits for SIGTERM while the block runs; the event is set where that came.

    It ends when this process lets go of a pipe, as SLURM tells no step anything on a node that is cut off.
    """
    os.mkfifo(pipe, 0o600)
    held = os.open(pipe, os.O_RDWR)
    here = f"--nodelist={os.environ['SLURMD_NODENAME']}"
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", here, "--export=ALL"]
    step += ["/bin/bash", "-c", _AWAIT_TERM, str(pipe)]
    waiting = subprocess.Popen(step, start_new_session=True, stdin=subprocess.DEVNULL)

    def watch() -> None:
        if waiting.wait() == _TERM_CAME:
            told.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        os.close(held)
        with suppress(subprocess.TimeoutExpired):
            waiting.wait(_STEP_END_S)
        end_session(waiting)


def seconds_left() -> float:
    """How long until SLURM ends this job; very long where it does not say."""
    job_id = os.environ["SLURM_JOB_ID"]
    question = ["squeue", "--noheader", "--format=%e", f"--jobs={job_id}"]
    said = probe(question, _END_QUESTION_S, slurm_environment())
    end = seconds_of(said.output.strip())
    if end is None:
        return threading.TIMEOUT_MAX
    return end - time.time()


def keep_controller(start: JobStart, nodes: AllocatedNodes, told: threading.Event, command: Sequence[str]) -> int:
    """Start the controller until the run has its result, or cannot go on here; gives 0 or REQUEUE."""
    backoff = Backoff()
    fewest = load_any_job(start.run_dir).resources.fewest_nodes
    fruitless = 0
    while start.is_latest():
        if nodes.settled_count() < fewest:
            return REQUEUE
        while not backoff.ready():
            time.sleep(_ALLOCATION_POLL_S)
        backoff.began()
        slot = note_latest_start(start.run_dir)
        code = run_controller(start.run_dir, nodes, told, command)
        if code == 0 or result(start.run_dir) is not None:
            return 0
        fruitless = fruitless + 1 if last_slot(start.run_dir) == slot else 0
        if fruitless >= _FRUITLESS_CONTROLLERS:
            print(f"{fruitless} controllers in a row made no attempt at the run", flush=True)
            return REQUEUE
        if start.is_latest() and (code == REQUEUE or told.is_set()):
            return REQUEUE
    print("the run was started again elsewhere; nothing to do", flush=True)
    return 0


def run_controller(run_dir: Path, nodes: AllocatedNodes, told: threading.Event, command: Sequence[str]) -> int:
    """Run the controller once; a warning is passed to it, once. Gives its exit code.

    One that does not end by itself after a node is lost is killed: it may wait for that node to start its workers.
    """
    count = nodes.count()
    environment = os.environ | {"RAY_ADDRESS": nodes.address} | REQUEUED | COLLECTED | on_nodes(count)
    controller = subprocess.Popen(command, env=environment, start_new_session=True)
    is_told = False
    whole_at = time.monotonic()
    while controller.poll() is None:
        if told.is_set() and not is_told:
            controller.send_signal(signal.SIGTERM)
            is_told = True
        if nodes.count() >= count:
            whole_at = time.monotonic()
        elif time.monotonic() - whole_at > _NODE_LOSS_S and result(run_dir) is None:
            end_session(controller)  # with what hands signals on to it, where it is in a container
        time.sleep(_ALLOCATION_POLL_S)
    return controller.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or [sys.executable]))
