"""How an attempt ended, and whether there is to be another one. Pure functions of texts and numbers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "success",
    "cancelled",
    "user_error",
    "out_of_memory",
    "preemption",
    "walltime",
    "node_lost",
    "network",
    "hang",
]

# Tried in this order, on the text of one worker's failure. Ray says of every dead worker that the OOM killer is among
# the common causes, so "OOM" alone proves nothing.
_SIGNS: tuple[tuple[Kind, str], ...] = (
    (
        "out_of_memory",
        r"OutOfMemoryError|out of memory\b(?! killer)|MemoryError|can't allocate memory|Cannot allocate memory"
        r"|NODE_OUT_OF_MEMORY|running low on memory|CUBLAS_STATUS_ALLOC_FAILED",
    ),
    ("preemption", r"(?i)preempt"),
    (
        "node_lost",
        r"ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError|worker process has died"
        r"|CheckpointGone",
    ),
    ("hang", r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|WorkerHealthCheckTimeoutError"),
    (
        "network",
        r"Connection (closed|reset|refused)|Connection(Reset|Refused|Aborted)?Error|Broken pipe|Socket closed"
        r"|nccl(Remote|System)Error|NCCL WARN .*[Cc]onnection|DistNetworkError|Temporary failure in name resolution",
    ),
)
# Looked for first: what follows are names of files, which may say anything.
_INPUT_CHANGED = r"^[\w.]*InputChanged: "
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


def classify(failures: Mapping[int, str], tails: Mapping[int, str] | None = None) -> Verdict:
    """The verdict on workers that failed: rank -> text of what was raised or known, and the ends of their logs.

    Rank -1 stands for what concerns no single worker, and is nobody's bug.
    """
    found = {rank: _kind(text, "user_error" if rank >= 0 else "node_lost") for rank, text in failures.items()}
    kind = next(kind for kind in _FIRST if kind in found.values())
    rank = min(rank for rank, its in found.items() if its == kind)
    text = failures[rank]
    reason = _reason(kind, text)
    evidence = _evidence(kind, (tails or {}).get(rank, "")) or _evidence(kind, text) or reason
    return Verdict(kind, reason if rank < 0 else f"rank {rank}: {reason}", evidence, rank if rank >= 0 else None)


def decide(history: Sequence[tuple[Kind, int]]) -> Again | Final:
    """What follows attempts that ended so, oldest first, each with the steps its checkpoints took the run further."""
    if not history:
        return Again(0.0)
    kind = history[-1][0]
    if kind == "success":
        return Final("succeeded", None)
    if kind == "cancelled":
        return Final("cancelled", "cancelled by request")
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


def _kind(text: str, otherwise: Kind) -> Kind:
    if re.search(_INPUT_CHANGED, text):
        return "user_error"
    return next((kind for kind, sign in _SIGNS if re.search(sign, text)), otherwise)


def _reason(kind: Kind, text: str) -> str:
    if kind == "node_lost" and "CheckpointGone" not in text:
        return "the worker process was killed, or its node is gone"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else kind


def _evidence(kind: Kind, text: str) -> str:
    """The last line that shows this kind of end; for a bug the last line of its traceback."""
    sign = dict(_SIGNS).get(kind, r"^\w[\w.]*(Error|Exception|Interrupt|Exit)\b")
    lines = [line.strip() for line in text.splitlines() if re.search(sign, line)]
    return lines[-1][:1000] if lines else ""
