"""What SLURM's commands print, as this project reads it: jobs, their endings, nodes, and forecasts.

Pure functions of text, as SLURM 22.05 to 25.x print it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from clusters.base import Capacity, ClusterState, run_of_submission

SQUEUE = ["squeue", "--me", "--noheader", "--states=all", "-o", "%i|%T|%r|%S|%B|%N|%j"]
STATE_AND_REASON = ["squeue", "--noheader", "--states=all", "-o", "%T|%r"]  # and -j with a job
SINFO = ["sinfo", "--noheader", "--Node", "-O", "StateCompact:20,Gres:500,GresUsed:500,CPUsState:60"]
SACCT = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State,End"]

# SLURM's states; in one that is not here a job has not ended, so as not to have it twice.
_STATES: Mapping[str, ClusterState] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_FED": "queued",
    "REQUEUE_HOLD": "queued",
    "RESV_DEL_HOLD": "queued",
    "SPECIAL_EXIT": "queued",
    "EXPEDITING": "queued",
    "CONFIGURING": "starting",
    "POWER_UP_NODE": "starting",
}
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
_NODE = re.compile(r"^(\S+) +(\S+) +(\S+) +(\d+/\d+/\d+/\d+) *$", re.MULTILINE)  # of the answer of SINFO
_UP = ("idle", "mix", "alloc", "comp", "resv", "plnd")
# What SLURM says of a job that it does not take; all else may be about reaching SLURM, and pass.
_REFUSALS = re.compile(
    r"invalid|denied|not permitted|no partition|more processors|too many|violates|node (count|configuration)"
    r"|not available|unspecified error|can ?not be satisfied",
    re.IGNORECASE,
)
_PREFIXES = re.compile(r"^((sbatch|error|allocation failure|Batch job submission failed): )*")  # of its lines
_SITES_LINES = 3
_UNSPECIFIED = "Unspecified error"  # what SLURM says where a site refuses a job in words of its own, before it
_AMBIGUOUS = "Requested node configuration is not available"  # so says a test also where nodes are only down
_UNREACHABLE = re.compile(r"Unable to contact|timed out")  # slurmctld is away, or slow: it may have heard
LAUNCH_FAILED = "launch failed requeued held"  # so a node that still has a job's last start answers its next one
_REASONS = {
    "None": "SLURM has not looked at it yet",
    "Priority": "others have a higher priority",
    "Resources": "waits for free nodes",
    "BeginTime": "was requeued, and may start again in a moment",
    "Dependency": "waits for another job",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "Nodes required for job are DOWN": "nodes that it needs are down, drained, or for jobs before it",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your quality of service allows",
    "QOSMaxGRESPerUser": "you have as many GPUs as your quality of service allows",
    "AssocGrpGRES": "your account has as many GPUs as it may",
    "AssocMaxJobsLimit": "your account has as many jobs running as it may",
    "JobHeldUser": "held: scontrol release lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "was requeued as often as the site allows, and is held: scontrol release lets it go on",
    LAUNCH_FAILED: "a node could not start it, and SLURM held it; it is let go on",
}
_NEVER_BY_ITSELF = {"PartitionTimeLimit", "JobHoldMaxRequeue"}  # beside all that is held


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue tells of it."""

    id: str
    name: str
    state: ClusterState | None  # None where it has ended
    reason: str
    start: str  # when SLURM expects it to start, or when it did
    first_node: str = ""  # where its script runs
    nodes: str = ""  # those that it has, as SLURM writes lists of them
    slurm_state: str = ""

    @property
    def run_id(self) -> str:
        """The run whose submission the job is."""
        return run_of_submission(self.name)

    @property
    def why_queued(self) -> str:
        """Why it waits, in words, and when SLURM expects it to start, with the zone of this machine."""
        told, _, tail = self.reason.partition(",")
        reason = _REASONS.get(told, self.reason)
        if told in _REASONS and ":" in tail:  # which nodes
            reason += f" ({tail.partition(':')[2]})"
        forecast = ""
        start = seconds_of(self.start)
        if start is not None:
            timestamp = datetime.fromtimestamp(start).astimezone()
            forecast = f"; SLURM expects its start at {timestamp:%Y-%m-%d %H:%M %z}"
        return f"SLURM job {self.id}: {reason}{forecast}"

    @property
    def why_held(self) -> str:
        """Why a job waits that is not let go on any more, as nodes could not start it."""
        what_to_do = f"have the site look at its nodes, then: scontrol release {self.id}"
        return f"SLURM job {self.id}: nodes could not start it, again and again, and SLURM holds it; {what_to_do}"

    @property
    def is_ending(self) -> bool:
        """Whether its processes are being ended: it goes back to the queue then, or does not."""
        return self.slurm_state == "COMPLETING"

    @property
    def has_lost_first_node(self) -> bool:
        """Whether it goes on without the node that its script was on, as a job that may lose nodes does."""
        if self.slurm_state != "RUNNING" or not self.nodes:
            return False
        return not _is_among(self.nodes, self.first_node)

    @property
    def is_stuck(self) -> bool:
        """Whether it waits for somebody to do something, not for SLURM."""
        is_held = "held" in self.reason.lower()
        return is_held or self.reason in _NEVER_BY_ITSELF


def queued_jobs(said: str) -> list[QueuedJob]:
    """The jobs in the answer of SQUEUE, those that ended lately too; no arrays, nor what wrappers print beside."""
    jobs = []
    for line in said.split("\n"):
        fields = line.split("|", 6)  # a name may have any character
        if len(fields) != 7 or not fields[0].isdecimal():
            continue
        id_, state, reason, start, node, nodes, name = fields
        live = None
        if state not in _ENDED:
            live = _STATES.get(state, "running")
        jobs.append(QueuedJob(id_, name, live, reason, start, node, nodes, state))
    return jobs


def taken_job(said: str) -> str:
    """The id in the answer of `sbatch --parsable`, whatever a wrapper prints beside; empty where there is none."""
    found = re.search(r"^(\d+)(;\S*)?$", said, re.MULTILINE)
    return found[1] if found else ""


def endings(said: str) -> dict[str, str]:
    """By job id, how the jobs in the answer of SACCT ended, like `CANCELLED by 1000 at 2026-11-29T10:59:52`."""
    ended = {}
    for line in said.splitlines():
        fields = line.split("|")
        if len(fields) == 3 and fields[1].partition(" ")[0] in _ENDED:
            id_, state, end = fields
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
    names: set[str | None] = set()
    for node in _NODE.finditer(said):
        state, gres, used, cores = node.groups()
        if state.rstrip("*~#%$@+-") not in _UP:
            continue
        total_gpus += _gpus_in(gres)
        names.update(_gpu_names_in(gres))
        used_gpus += _gpus_in(used)
        _, idle, _, all_cores = map(int, cores.split("/"))
        total_cores += all_cores
        idle_cores += idle
    if total_gpus:
        name = names.pop() if len(names) == 1 else None
        return Capacity("gpu", total_gpus, total_gpus - used_gpus, name)
    return Capacity("cpu", total_cores, idle_cores)


def is_ended_by_others(said: str) -> bool:
    """Whether SLURM ends a job, in the answer of STATE_AND_REASON, as somebody cancelled it, or to start it again.

    At a walltime it ends the job too, but nobody wants that.
    """
    state, _, reason = said.strip().partition("|")
    ends = state in ("COMPLETING", "CANCELLED")
    return ends and reason != "TimeLimit"


def is_unreachable(said: str) -> bool:
    """Whether the errors of a command of SLURM are about reaching slurmctld."""
    return bool(_UNREACHABLE.search(said))


def start_in(said: str) -> float | None:
    """When `sbatch --test-only` expects a job to start, in seconds since 1970; None where it does not say."""
    start = re.search(r"to start at (\S+)", said)
    if start is None:
        return None
    return seconds_of(start[1])


def seconds_of(timestamp: str) -> float | None:
    """A timestamp of SLURM, in seconds since 1970; None where it is not known, or printed in another way."""
    with suppress(ValueError):
        return datetime.fromisoformat(timestamp).timestamp()
    return None


def refusal_in(said: str, is_test: bool = False) -> str | None:
    """Why SLURM does not take a job, in its words; None where its error is not about the job, or may pass."""
    lines = [_PREFIXES.sub("", line) for line in said.strip().splitlines()]
    if not lines:
        return None
    last = lines[-1]
    if is_test and last == _AMBIGUOUS:
        return None
    if last == _UNSPECIFIED:
        words_of_site = lines[-1 - _SITES_LINES : -1]
        return "; ".join([*words_of_site, last])
    return last if _REFUSALS.search(last) else None


def _is_among(nodes: str, node: str) -> bool:
    """Whether a list of nodes, like `a[1-3,07],b`, has one; also where it is written in a way that is not known."""
    for part in re.split(r",(?![^\[]*\])", nodes):
        found = re.fullmatch(r"([^\[\]]*)(?:\[([\d,-]+)\]([^\[\]]*))?", part)
        if found is None or part == node:
            return True
        prefix, ranges, suffix = found.groups()
        inner = node.removeprefix(prefix).removesuffix(suffix or "")
        is_of_part = node == f"{prefix}{inner}{suffix}"
        if ranges and inner.isdecimal() and is_of_part and _is_in_ranges(inner, ranges):
            return True
    return False


def _is_in_ranges(number: str, ranges: str) -> bool:
    """Whether ranges like `1-3,07` have a number, whose digits may begin with zeros."""
    value = int(number)
    for numbers in ranges.split(","):
        first, _, last = numbers.partition("-")
        is_long_enough = len(first) <= len(number)
        if is_long_enough and int(first) <= value <= int(last or first):
            return True
    return False


def _gpu_names_in(gres: str) -> Iterator[str | None]:
    """What the GPUs of a node are called, like `h100` in `gpu:h100:4(S:0-1)`; None for those without a name."""
    for part in gres.split(","):
        fields = part.partition("(")[0].split(":")
        if fields[0] == "gpu":
            yield fields[1] if len(fields) == 3 else None


def _gpus_in(gres: str) -> int:
    """The GPUs in what sinfo says of a node's resources, like `gpu:a100:4(S:0-1),tmpdisk:1`."""
    total = 0
    for part in gres.split(","):
        fields = part.partition("(")[0].split(":")
        if fields[0] == "gpu" and fields[-1].isdigit():
            total += int(fields[-1])
    return total
