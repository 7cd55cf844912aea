"""How an attempt ended, and whether there is to be another one. Pure functions of failures and numbers.

A failure is judged by the types of what was raised, as the message of a bug may say anything. Only libraries that
raise a plain RuntimeError for what the machine did are known by the form of their messages.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.failure import Failure

VerdictKind = Literal[
    "success",
    "cancelled",
    "paused",
    "user_error",
    "out_of_memory",
    "preemption",
    "walltime",
    "node_lost",
    "network",
    "hang",
]

_GONE = "trainer.checkpoint.reading.CheckpointGone"
# By the class that was raised, one of its bases, or what Ray names as the cause.
_KIND_OF_TYPE: Mapping[str, VerdictKind] = {
    "builtins.MemoryError": "out_of_memory",
    "torch.OutOfMemoryError": "out_of_memory",
    "ray.exceptions.OutOfMemoryError": "out_of_memory",
    "ray.train.v2.api.exceptions.PreemptionError": "preemption",
    "ray.exceptions.ActorDiedError": "node_lost",
    "ray.exceptions.ActorUnavailableError": "node_lost",
    "ray.exceptions.LocalRayletDiedError": "node_lost",
    "ray.exceptions.NodeDiedError": "node_lost",
    "ray.exceptions.WorkerCrashedError": "node_lost",
    _GONE: "node_lost",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckTimeoutError": "hang",
    "builtins.ConnectionError": "network",
    "httpx.TransportError": "network",
    "requests.exceptions.ConnectionError": "network",
    "socket.gaierror": "network",
    "torch.distributed.DistNetworkError": "network",
    "torch.distributed.DistStoreError": "network",
}
_PLAIN = ("builtins.RuntimeError", "builtins.OSError", "torch.AcceleratorError")
_NCCL = "torch.distributed.DistBackendError"
# Of exactly these classes, by what the library writes: torch's allocators, gloo, NCCL.
_MESSAGE_FORMS: tuple[tuple[VerdictKind, tuple[str, ...], str], ...] = (
    ("out_of_memory", (*_PLAIN, _NCCL), r"out of memory|allocate memory|STATUS_ALLOC_FAILED"),
    ("hang", (*_PLAIN, _NCCL), r"Watchdog caught collective operation timeout"),
    ("hang", _PLAIN, r"\[\S*gloo/transport/\S*\] Timed out waiting \d+ms"),
    (
        "network",
        _PLAIN,
        r"\[\S*gloo/transport/\S*\] .*(Connection|Socket|Broken pipe|reset by peer)|Gloo connectFullMesh failed",
    ),
    (
        "network",
        (_NCCL,),
        r"nccl(Remote|System)Error|NCCL WARN .*[Cc]onnection|Connection (closed|reset|refused)|Broken pipe"
        r"|Socket (closed|Timeout)",
    ),
)
# What a log line looks like that shows such an end: to quote it, not to judge by it.
_SIGNS: Mapping[VerdictKind, str] = {
    "out_of_memory": r"OutOfMemoryError|out of memory\b(?! killer)|MemoryError|allocate memory|running low on memory"
    r"|STATUS_ALLOC_FAILED",
    "preemption": r"(?i)preempt",
    "node_lost": r"ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError|worker process has died"
    r"|CheckpointGone",
    "hang": r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|WorkerHealthCheckTimeoutError",
    "network": r"Connection (closed|reset|refused)|Connection(Reset|Refused|Aborted)?Error|Broken pipe|Socket closed"
    r"|nccl(Remote|System)Error|NCCL WARN .*[Cc]onnection|Dist(Network|Store)Error|name resolution",
}
# Where workers failed in several ways: what made the others fail comes first. A real bug shows again next time.
_FIRST: tuple[VerdictKind, ...] = ("out_of_memory", "preemption", "node_lost", "user_error", "hang", "network")

_NEVER_AGAIN: tuple[VerdictKind, ...] = ("user_error", "out_of_memory")
_LIMIT_WITHOUT_PROGRESS: Mapping[VerdictKind, int] = {"hang": 3, "network": 3}
_DEFAULT_LIMIT = 5
_LONGEST_DELAY_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended: in one word, in one line, and with the log line that proves it."""

    kind: VerdictKind
    reason: str
    evidence: str = ""
    rank: int | None = None

    def dump(self) -> dict[str, Any]:
        """The verdict as plain data, for verdict.json."""
        return asdict(self)


@dataclass(frozen=True)
class Again:
    """Try again, after so many seconds."""

    delay_s: float


@dataclass(frozen=True)
class Final:
    """End the run in this state."""

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None
    hint: str | None = None  # how to go on; it follows the last attempt's own reason


def classify(failures: Mapping[int, Failure], tails: Mapping[int, str] | None = None) -> Verdict:
    """The verdict on workers that failed: rank -> what was raised or known, and the ends of their logs.

    Rank -1 stands for what concerns no single worker, and is nobody's bug.
    """
    kinds = _kinds(failures)
    kind = _first_cause(kinds.values())
    rank = min(rank for rank in kinds if kinds[rank] == kind)
    failure = failures[rank]
    reason = _reason(kind, failure)
    evidence = ""
    if tails:
        tail = tails.get(rank, "")
        evidence = _evidence(kind, tail)
    if not evidence:
        evidence = _evidence(kind, failure.text) or reason
    if rank < 0:
        return Verdict(kind, reason, evidence)
    return Verdict(kind, f"rank {rank}: {reason}", evidence, rank)


def decide(history: Sequence[tuple[VerdictKind, int]], requeued: bool = False) -> Again | Final:
    """What follows attempts that ended so, oldest first, each with the steps its checkpoints took the run further.

    `requeued`: a scheduler starts the run again whose time there is over; else its walltime is a limit.
    """
    if not history:
        return Again(0.0)
    kind = history[-1][0]
    if kind == "success":
        return Final("succeeded", None)
    if kind == "cancelled":
        return Final("cancelled", "cancelled by request")
    if kind == "paused":
        return Final("cancelled", None, "fleetune resume goes on from there")
    if kind == "walltime" and not requeued:
        return Final("failed", None, "fleetune resume goes on from the newest checkpoint")
    if kind in _NEVER_AGAIN:
        return Final("failed", None)
    without_progress = _attempts_without_progress(history)
    if without_progress >= _LIMIT_WITHOUT_PROGRESS.get(kind, _DEFAULT_LIMIT):
        return Final("failed", f"{without_progress} attempts in a row without progress, the last one ended by {kind}")
    if without_progress == 0:
        return Again(0.0)
    backoff_s = 2.0 ** (without_progress - 1)
    return Again(min(_LONGEST_DELAY_S, backoff_s))


def _attempts_without_progress(history: Sequence[tuple[VerdictKind, int]]) -> int:
    """Number of attempts without progress at the end of a history."""
    count = 0
    for _, steps in reversed(history):
        if steps > 0:
            break
        count += 1
    return count


def _kinds(failures: Mapping[int, Failure]) -> dict[int, VerdictKind]:
    """What each failure is, by rank."""
    kinds = {}
    for rank, failure in failures.items():
        kinds[rank] = _kind_on_rank(rank, failure)
    return kinds


def _kind_on_rank(rank: int, failure: Failure) -> VerdictKind:
    """What a failure is: where its types do not tell, a bug of the user in a worker, and elsewhere a lost node."""
    known = _known_kind(failure)
    if known is not None:
        return known
    if rank >= 0:
        return "user_error"
    return "node_lost"


def _known_kind(failure: Failure) -> VerdictKind | None:
    """What a failure is by its types; None for any other error."""
    kinds: set[VerdictKind] = set()
    if failure.preempted:
        kinds.add("preemption")
    for name in failure.types:
        if name in _KIND_OF_TYPE:
            kinds.add(_KIND_OF_TYPE[name])
    raised = ""
    if failure.types:
        raised = failure.types[0]
    for kind, types, form in _MESSAGE_FORMS:
        if raised in types and re.search(form, failure.text):
            kinds.add(kind)
    if not kinds:
        return None
    return _first_cause(kinds)


def _first_cause(kinds: Collection[VerdictKind]) -> VerdictKind:
    """The one of some kinds that made the others happen."""
    return min(kinds, key=_FIRST.index)


def _reason(kind: VerdictKind, failure: Failure) -> str:
    if kind == "node_lost" and _GONE not in failure.types:
        return "the worker process was killed, or its node is gone"
    for line in reversed(failure.text.splitlines()):
        if line.strip():
            return line.strip()
    return kind


def _evidence(kind: VerdictKind, text: str) -> str:
    """The last line that shows this kind of end; for a bug the last line of its traceback."""
    sign = _SIGNS.get(kind, r"^\w[\w.]*(Error|Exception|Interrupt|Exit)\b")
    for line in reversed(text.splitlines()):
        if re.search(sign, line):
            return line.strip()[:1000]
    return ""
