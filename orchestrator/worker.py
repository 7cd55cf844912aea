"""What the controller has Ray run on every worker: the trainer, or an evaluation, with its output in the folder."""

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from orchestrator.failure import types_of


class WorkerFailed(RuntimeError):
    """What a worker raised, as text and types: any exception travels, also one that cannot be pickled."""

    def __init__(self, text: str, types: tuple[str, ...]) -> None:
        super().__init__(text, types)
        self.text = text
        self.types = types

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def by(error: BaseException) -> "WorkerFailed":
        """The failure of a worker that raised `error`."""
        lines = traceback.format_exception_only(error)
        text = "".join(lines).strip()
        return WorkerFailed(text, types_of(error))


def work(run_dir: str, attempt: int, environment: Mapping[str, str]) -> None:
    """Do this worker's part of an attempt; raises WorkerFailed."""
    os.environ.update(environment)
    rank = os.environ["RANK"]
    logs = Path(run_dir) / "attempts" / str(attempt) / "logs"
    redirect(logs / f"rank-{rank}.log")
    print(f"[rank {rank}] pid {os.getpid()} on {socket.gethostname()}")
    try:
        _do(Path(run_dir), attempt)
    except BaseException as error:
        traceback.print_exc()
        raise WorkerFailed.by(error) from None


def redirect(log: Path) -> None:
    """Send the output of this process, and of libraries in it, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _do(run_dir: Path, attempt: int) -> None:
    """Train, evaluate or write, as the job of the run says."""
    from runfolder.evaluation_job import EvaluationJob
    from runfolder.generation_job import GenerationJob
    from runfolder.record import load_any_job

    job = load_any_job(run_dir)
    if isinstance(job, EvaluationJob):
        from orchestrator.evaluation.attempt import evaluate_attempt

        evaluate_attempt(run_dir, attempt)
    elif isinstance(job, GenerationJob):
        from orchestrator.generation.attempt import generate_attempt

        generate_attempt(run_dir, attempt)
    else:
        _train(run_dir, attempt)


def _train(run_dir: Path, attempt: int) -> None:
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    from trainer.loop import train

    train(run_dir, attempt)
