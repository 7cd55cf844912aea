"""How an attempt ended, and whether there is to be another one. Pure functions of failures and numbers.

A failure is judged by the types of what was raised, never by what a message says: a bug may say anything. Libraries
that raise a plain RuntimeError for what the machine did are known by the form of their messages.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.failure import Failure

Kind = Literal[
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
_TYPES: Mapping[str, Kind] = {
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
_FORMS: tuple[tuple[Kind, tuple[str, ...], str], ...] = (
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
_SIGNS: Mapping[Kind, str] = {
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
_FIRST: tuple[Kind, ...] = ("out_of_memory", "preemption", "node_lost", "user_error", "hang", "network")

_NEVER_AGAIN: tuple[Kind, ...] = ("user_error", "out_of_memory")
_BARREN_LIMIT: Mapping[Kind, int] = {"hang": 3, "network": 3}
_DEFAULT_BARREN_LIMIT = 5
_LONGEST_DELAY_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended: in one word, in one line, and with the log line that proves it."""

    kind: Kind
    reason: str
    evidence: str = ""
    rank: int | None = None

    def dump(self) -> dict[str, Any]:
        """As plain data, for verdict.json."""
        return asdict(self)


@dataclass(frozen=True)
class Again:
    """Try again, after so many seconds."""

    delay_s: float


@dataclass(frozen=True)
class Final:
    """End the run."""

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None
    mend: str | None = None  # what follows the last attempt's own reason


def classify(failures: Mapping[int, Failure], tails: Mapping[int, str] | None = None) -> Verdict:
    """The verdict on workers that failed: rank -> what was raised or known, and the ends of their logs.

    Rank -1 stands for what concerns no single worker, and is nobody's bug.
    """
    found = {
        rank: _kind(failure) or ("user_error" if rank >= 0 else "node_lost") for rank, failure in failures.items()
    }
    kind = next(kind for kind in _FIRST if kind in found.values())
    rank = min(rank for rank, its in found.items() if its == kind)
    text = failures[rank].text
    reason = _reason(kind, failures[rank])
    evidence = _evidence(kind, (tails or {}).get(rank, "")) or _evidence(kind, text) or reason
    return Verdict(kind, reason if rank < 0 else f"rank {rank}: {reason}", evidence, rank if rank >= 0 else None)


def decide(history: Sequence[tuple[Kind, int]], requeued: bool = False) -> Again | Final:
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
    barren = _barren(history)
    if barren >= _BARREN_LIMIT.get(kind, _DEFAULT_BARREN_LIMIT):
        return Final("failed", f"{barren} attempts in a row without progress, the last one ended by {kind}")
    return Again(min(_LONGEST_DELAY_S, 2.0 ** (barren - 1)) if barren else 0.0)


def _barren(history: Sequence[tuple[Kind, int]]) -> int:
    """Number of attempts without progress at the end of a history."""
    count = 0
    for _, steps in reversed(history):
        if steps > 0:
            break
        count += 1
    return count


def _kind(failure: Failure) -> Kind | None:
    """What a failure is by its types; None for any other error."""
    found = {_TYPES[name] for name in failure.types if name in _TYPES}
    found |= {"preemption"} if failure.preempted else set()
    raised = failure.types[0] if failure.types else ""
    found |= {kind for kind, types, form in _FORMS if raised in types and re.search(form, failure.text)}
    return next((kind for kind in _FIRST if kind in found), None)


def _reason(kind: Kind, failure: Failure) -> str:
    if kind == "node_lost" and _GONE not in failure.types:
        return "the worker process was killed, or its node is gone"
    lines = [line.strip() for line in failure.text.splitlines() if line.strip()]
    return lines[-1] if lines else kind


def _evidence(kind: Kind, text: str) -> str:
    """The last line that shows this kind of end; for a bug the last line of its traceback."""
    sign = _SIGNS.get(kind, r"^\w[\w.]*(Error|Exception|Interrupt|Exit)\b")
    lines = [line.strip() for line in text.splitlines() if re.search(sign, line)]
    return lines[-1][:1000] if lines else ""
