"""How a batch job of SLURM, of which this process is a part, goes back to the queue."""

import os
import time
from contextlib import suppress
from pathlib import Path

from clusters.base import number_of_submission
from clusters.job_start import JobStart
from clusters.slurm_answers import STATE_AND_REASON, is_ended_by_others, is_unreachable
from clusters.slurm_commands import NoAnswer, call_slurm

_QUESTION_S = 10.0  # for one question to slurmctld
_REPEAT_S = 1.0  # between two


def start_of_this_job(run_dir: Path, name: str) -> JobStart:
    """The start that this process belongs to, of the submission `name`."""
    number = number_of_submission(name)
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return JobStart(run_dir, number, requeues)


def requeue(start: JobStart) -> int:
    """Send this job back to the queue, unless the run was started again since; gives scontrol's exit code.

    A node that is cut off asks until it is heard. What it asks must not end the next start of the same job, so it
    looks for that once slurmctld has answered a question, and right before it asks for the requeue. Raises
    Unreachable where there are no such commands: no repetition changes that.

    A job that somebody cancelled by hand stays cancelled: SLURM would take its requeue as long as it has not ended.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    command = ["scontrol", "requeue", job_id]
    while start.is_latest():
        with suppress(NoAnswer):
            asked = call_slurm([*STATE_AND_REASON, "-j", job_id], timeout_s=_QUESTION_S)
            if is_ended_by_others(asked.stdout):
                print("SLURM ends this job: it does not go back to the queue by itself", flush=True)
                return 0
            is_heard = not is_unreachable(asked.stderr)
            if is_heard and start.is_latest():
                ran = call_slurm(command, timeout_s=_QUESTION_S)
                if not is_unreachable(ran.stderr):
                    print(ran.stderr, end="", flush=True)
                    return ran.returncode
        time.sleep(_REPEAT_S)
    return 0
