"""One start of a batch job: whether it is the latest one of its run, and how it goes back to the queue."""

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clusters.base import number_of_submission
from clusters.slurm_answers import is_unreachable
from runfolder.files import list_names, refresh

_REQUEUE_S = 10.0  # for one question to slurmctld
_REQUEUE_POLL_S = 1.0  # between two


@dataclass(frozen=True)
class JobStart:
    """One start of a batch job of a run: by its submission, and by how often its job was requeued.

    Of two starts of a run (a node that was cut off lives on while its job was requeued, or the run was submitted
    again) the later one works: each leaves its name in RUN_DIR/starts.
    """

    run_dir: Path
    submission: int
    requeues: int

    @staticmethod
    def of_this_job(run_dir: Path, name: str) -> "JobStart":
        """The start that this process belongs to, of the submission `name`."""
        number = number_of_submission(name)
        return JobStart(run_dir, number, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

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

    def requeue(self) -> int:
        """Send this job back to the queue, unless the run was started again since; gives scontrol's exit code.

        A node that is cut off asks until it is heard. What it asks must not end the next start of the same job, so
        it looks for that before each try, and no try lasts.
        """
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        while self.is_latest():
            with suppress(subprocess.TimeoutExpired):
                ran = subprocess.run(command, capture_output=True, text=True, timeout=_REQUEUE_S, check=False)
                if not is_unreachable(ran.stderr):
                    print(ran.stderr, end="", flush=True)
                    return ran.returncode
            time.sleep(_REQUEUE_POLL_S)
        return 0
