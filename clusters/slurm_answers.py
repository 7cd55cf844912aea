"""What SLURM's commands print, as this project reads it: jobs, their endings, nodes, and forecasts.

Pure functions of text, as SLURM 22.05 to 25.x print it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from clusters.base import Capacity, ClusterState, run_of_submission

SQUEUE = ["squeue", "--me", "--noheader", "--states=all", "-o", "%i|%T|%r|%S|%j"]
SINFO = ["sinfo", "--noheader", "--Node", "-O", "StateCompact:20,Gres:200,GresUsed:200,CPUsState:60"]
SACCT = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State,End"]

# SLURM's states; what is not here has ended, or is not known.
_STATES: Mapping[str, ClusterState] = {
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
_UP = ("idle", "mix", "alloc", "comp", "resv")
# What SLURM says of a job that it does not take; all else may be about reaching SLURM, and pass.
_REFUSALS = re.compile(
    r"invalid|denied|not permitted|no partition|more processors|too many|violates|node (count|configuration)"
    r"|not available",
    re.IGNORECASE,
)
_AMBIGUOUS = "Requested node configuration is not available"  # so says a test also where nodes are only down
_UNREACHABLE = re.compile(r"Unable to contact|timed out")  # slurmctld is away, or slow: it may have heard
LAUNCH_FAILED = "launch failed requeued held"  # so a node that still has a job's last start answers its next one
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
    LAUNCH_FAILED: "a node could not start it, and SLURM held it; it is let go on",
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
        return run_of_submission(self.name)

    @property
    def why_queued(self) -> str:
        """Why it waits, in words, and when SLURM expects it to start."""
        reason = _REASONS.get(self.reason, self.reason)
        forecast = ""
        if self.start not in ("", "N/A", "NULL"):
            forecast = f"; SLURM expects its start at {self.start}"
        return f"SLURM job {self.id}: {reason}{forecast}"


def queued_jobs(said: str) -> list[QueuedJob]:
    """The jobs in the answer of SQUEUE, those that ended lately too."""
    jobs = []
    for line in said.splitlines():
        id_, state, reason, start, name = line.split("|", 4)  # a name may have any character
        jobs.append(QueuedJob(id_, name, _STATES.get(state), reason, start))
    return jobs


def endings(said: str) -> dict[str, str]:
    """By job id, how the jobs in the answer of SACCT ended, like `CANCELLED by 1000 at 2026-11-29T10:59:52`."""
    ended = {}
    for line in said.splitlines():
        id_, state, end = line.split("|")
        ended[id_] = f"{state} at {end}"
    return ended


def words_of_ending(job_id: str, ended: Mapping[str, str]) -> str:
    """What became of a run whose newest job, if there was one, is in the queue no more."""
    if not job_id:
        return "SLURM has no job of this run"
    if job_id not in ended:
        return f"SLURM has no job {job_id} any more"
    return f"SLURM job {job_id} ended: {ended[job_id]}"


def capacity_of(said: str) -> Capacity:
    """GPUs of the nodes in the answer of SINFO that are up, or their cores where they have none."""
    total_gpus = used_gpus = total_cores = idle_cores = 0
    for line in said.splitlines():
        state, gres, used, cores = line.split()
        if state.rstrip("*~#%$@+-") not in _UP:
            continue
        total_gpus += _gpus_in(gres)
        used_gpus += _gpus_in(used)
        _, idle, _, all_cores = map(int, cores.split("/"))
        total_cores += all_cores
        idle_cores += idle
    if total_gpus:
        return Capacity("gpu", total_gpus, total_gpus - used_gpus)
    return Capacity("cpu", total_cores, idle_cores)


def is_unreachable(said: str) -> bool:
    """Whether the errors of a command of SLURM are about reaching slurmctld."""
    return bool(_UNREACHABLE.search(said))


def start_in(said: str) -> float | None:
    """When `sbatch --test-only` expects a job to start, in seconds since 1970; None where it does not say."""
    start = re.search(r"to start at (\S+)", said)
    if start is None:
        return None
    return datetime.fromisoformat(start[1]).timestamp()


def refusal_in(said: str, is_test: bool = False) -> str | None:
    """Why SLURM does not take a job, in its words; None where its error is not about the job, or may pass."""
    last = said.strip().splitlines()[-1:]
    words = re.sub(r"^((sbatch|error|allocation failure|Batch job submission failed): )*", "", "".join(last))
    if not _REFUSALS.search(words) or (is_test and words == _AMBIGUOUS):
        return None
    return words


def _gpus_in(gres: str) -> int:
    """The GPUs in what sinfo says of a node's resources, like `gpu:a100:4(S:0-1),tmpdisk:1`."""
    total = 0
    for part in gres.split(","):
        fields = part.partition("(")[0].split(":")
        if fields[0] == "gpu" and fields[-1].isdigit():
            total += int(fields[-1])
    return total
