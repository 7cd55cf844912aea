"""SLURM, from one of its login nodes: a submission is a real batch job, which may wait for days and be requeued.

sbatch, squeue and scancel are commands of this machine. A job has the name of its submission, `<run_id>-s<number>`.
By it a job is found again, whatever became of the answer of sbatch. ROOT/slurm/ has the script of each submission,
and what it printed before there was an attempt to write to.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clusters.base import Capacity, ClusterRequest, ClusterState, ClusterStatus, Logs, SubmissionRefused, Unreachable
from clusters.config import SlurmConfig
from clusters.controllers import controller_command
from clusters.environment import can_be_variable, settings
from clusters.slurm_script import BatchJob, batch_script
from runfolder.chain import result
from runfolder.job import Job
from runfolder.site import LocalSite

_TIMEOUT_S = 60.0
_LONGEST_ENVIRONMENT = 1 << 20  # characters: slurmctld keeps every script, and takes 4 MiB

# SLURM's states; what is not here has ended, or is not known.
_STATES: dict[str, ClusterState] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "CONFIGURING": "starting",
    "RUNNING": "running",
    "SUSPENDED": "running",
    "COMPLETING": "running",
    "STAGE_OUT": "running",
}
_REASONS = {
    "Priority": "others have a higher priority",
    "Resources": "waits for free nodes",
    "BeginTime": "was requeued, and may start again in a moment",
    "Dependency": "waits for another job",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your quality of service allows",
    "QOSMaxGRESPerUser": "you have as many GPUs as your quality of service allows",
    "AssocGrpGRES": "your account has as many GPUs as it may",
    "AssocMaxJobsLimit": "your account has as many jobs running as it may",
    "JobHeldUser": "held: scontrol release lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "launch failed requeued held": "could not be started, and is held: see the site's administrators",
}


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue tells of it."""

    id: str
    name: str
    state: ClusterState | None  # None where it has ended
    reason: str
    start: str  # when SLURM expects it to start

    @property
    def run_id(self) -> str:
        """The run whose submission the job is."""
        run_id, _, _ = self.name.rpartition("-s")
        return run_id

    @property
    def why_queued(self) -> str:
        """Why it waits, in words, and when SLURM expects it to start."""
        reason = _REASONS.get(self.reason, self.reason)
        forecast = ""
        if self.start not in ("", "N/A", "NULL"):
            forecast = f"; SLURM expects its start at {self.start}"
        return f"SLURM job {self.id}: {reason}{forecast}"


@dataclass(frozen=True)
class Slurm:
    """The SLURM site of this login node, with run folders in `home`/runs."""

    config: SlurmConfig
    home: Path

    @property
    def site(self) -> LocalSite:
        """The run folders on the file system that nodes and login nodes share."""
        return LocalSite(self.home / "runs")

    @property
    def folder(self) -> Path:
        """Scripts and outputs of submissions."""
        return self.home / "slurm"

    def request(self, job: Job, run_id: str, submission: int = 1, secrets: tuple[str, ...] = ()) -> ClusterRequest:
        """What would be submitted: the whole batch script. Raises SubmissionRefused."""
        environment = {**self.config.env, **settings(job, {}), "FLEETUNE_HOME": str(self.home)}
        _check_environment(environment)
        name = f"{run_id}-s{submission}"
        run_dir = str(self.site.root / run_id)
        log = str(self.folder / f"{name}.log")
        batch = BatchJob(name, run_dir, log, job, environment)
        text = batch_script(batch, self.config, sys.executable)
        return ClusterRequest(run_id, submission, run_dir, text, secrets)

    def submit(self, request: ClusterRequest) -> None:
        """Queue a batch job, unless the submission has one; raises Unreachable where it is not known to be queued."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._submitting(request.name):
            if self._is_submitted(request.name):
                return
            script = self.folder / f"{request.name}.sh"
            script.write_text(request.text)
            said = self._run(["sbatch", "--parsable", str(script)])
            job_id = said.strip().partition(";")[0]
            self._note(request.name).write_text(job_id)

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run: its newest submission's, as squeue tells it for all of them at once."""
        jobs = self._jobs()
        return {run_id: self._status(run_id, jobs) for run_id in run_ids}

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's batch jobs printed, the newest submission's after the others'."""
        texts = []
        for path in sorted(self.folder.glob(f"{run_id}-s*.log"), key=lambda path: path.stat().st_mtime):
            texts.append(path.read_bytes())
        data = b"".join(texts)[offset:]
        return Logs(data.decode(errors="replace"), offset + len(data))

    def cancel(self, run_id: str) -> None:
        """Take the run's jobs out of the queue, and close it here where no controller runs that would."""
        for job in _live_jobs(run_id, self._jobs()):
            if job.state == "queued":
                self._run(["scancel", job.id])
        left = _live_jobs(run_id, self._jobs())  # one may have started meanwhile
        if all(job.state == "queued" for job in left):
            self._close(run_id)

    def capacity(self) -> Capacity:
        """GPUs of the partition's nodes that are up, or their cores where they have none."""
        command = ["sinfo", "--noheader", "--Node", "-O", "StateCompact:20,Gres:200,GresUsed:200,CPUsState:60"]
        if self.config.partition:
            command += ["-p", self.config.partition]
        total_gpus = used_gpus = total_cores = idle_cores = 0
        for line in self._run(command).splitlines():
            state, gres, used, cores = line.split()
            if state.rstrip("*~#%$@+-") not in ("idle", "mix", "alloc", "comp", "resv"):
                continue
            total_gpus += _gpus_in(gres)
            used_gpus += _gpus_in(used)
            _, idle, _, all_cores = map(int, cores.split("/"))
            total_cores += all_cores
            idle_cores += idle
        if total_gpus:
            return Capacity("gpu", total_gpus, total_gpus - used_gpus)
        return Capacity("cpu", total_cores, idle_cores)

    def _status(self, run_id: str, jobs: list[QueuedJob]) -> ClusterStatus:
        if result(self.site.root / run_id) is not None:
            return ClusterStatus("ended")
        live = _live_jobs(run_id, jobs)
        if not live:
            return ClusterStatus("unknown", "SLURM has no job of this run; fleetune resume submits it again")
        job = live[-1]
        if job.state == "queued":
            return ClusterStatus("queued", job.why_queued, stuck="held" in job.reason.lower())
        return ClusterStatus(job.state or "unknown", f"SLURM job {job.id}")

    def _is_submitted(self, name: str) -> bool:
        """Whether a submission has a job, wherever that has got to."""
        return self._note(name).exists() or any(job.name == name for job in self._jobs())

    def _jobs(self) -> list[QueuedJob]:
        """This user's jobs that SLURM knows of, those that ended lately too."""
        said = self._run(["squeue", "--me", "--noheader", "--states=all", "-o", "%i|%T|%r|%S|%j"])
        jobs = []
        for line in said.splitlines():
            id_, state, reason, start, name = line.split("|", 4)  # a name may have any character
            jobs.append(QueuedJob(id_, name, _STATES.get(state), reason, start))
        return jobs

    def _note(self, name: str) -> Path:
        """Where the job id of a submission is written down."""
        return self.folder / f"{name}.job"

    @contextmanager
    def _submitting(self, name: str) -> Iterator[None]:
        """One client at a time for a submission; the lock falls with its process."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _close(self, run_id: str) -> None:
        """Have a controller close a cancelled run: that needs no allocation."""
        command = controller_command(str(self.site.root / run_id))
        environment = dict(os.environ)
        environment.pop("RAY_ADDRESS", None)
        subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT_S, check=False)

    def _run(self, command: list[str]) -> str:
        """What a command of SLURM prints; raises Unreachable where it fails, as a repetition may not."""
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"SLURM: {command[0]}: {error}") from None
        if ran.returncode:
            lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
            raise Unreachable(f"SLURM: {command[0]}: {lines[-1]}")
        return ran.stdout


def _live_jobs(run_id: str, jobs: list[QueuedJob]) -> list[QueuedJob]:
    """The jobs of a run's submissions that have not ended, oldest first."""
    live = [job for job in jobs if job.run_id == run_id and job.state]
    return sorted(live, key=lambda job: int(job.id))


def _check_environment(environment: dict[str, str]) -> None:
    """Raise Refused for variables that no script can export."""
    for name, value in environment.items():
        if not can_be_variable(name, value):
            raise SubmissionRefused(
                f"env: found {name!r}; allowed: names of letters, digits and _, and values without NUL"
            )
    size = len(json.dumps(environment))
    if size > _LONGEST_ENVIRONMENT:
        raise SubmissionRefused(f"env: found {size} characters; allowed: {_LONGEST_ENVIRONMENT}")


def _gpus_in(gres: str) -> int:
    """The GPUs in what sinfo says of a node's resources, like `gpu:a100:4(S:0-1),tmpdisk:1`."""
    total = 0
    for part in gres.split(","):
        fields = part.partition("(")[0].split(":")
        if fields[0] == "gpu" and fields[-1].isdigit():
            total += int(fields[-1])
    return total
