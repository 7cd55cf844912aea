"""A barrier: runs of other data, another budget or other software are not in one ranking, unless somebody says so.

Scores drift when libraries are renewed, also of the very same job, by more than methods differ. What differs is
said; those that differ get a ranking of their own.
"""

from collections import Counter
from collections.abc import Sequence

from orchestrator.comparison.run import TrackedRun

RunKind = tuple[str, ...]  # what must be equal for one ranking, in the order of its names
_DATA = ("data.train_digest", "data.eval_digest", "evaluation.rows", "base_digest")
_BUDGET = ("train.steps", "train.epochs", "train.batch_tokens")
_SOFTWARE = ("fleetune.version", "fleetune.env.torch", "fleetune.env.transformers", "fleetune.env.peft")
NAMES = (*_DATA, *_BUDGET, *_SOFTWARE)


def run_kind(run: TrackedRun) -> RunKind:
    """What of a run must be equal for one ranking."""
    values = []
    for name in NAMES:
        value = run.params.get(name) or run.tags.get(name, "")
        values.append(value)
    return tuple(values)


def strata(groups: Sequence[Sequence[TrackedRun]]) -> list[list[int]]:
    """The numbers of groups of runs that may be ranked together; the largest stratum first."""
    by_kind: dict[RunKind, list[int]] = {}
    for number, runs in enumerate(groups):
        kind = run_kind(runs[0])
        numbers = by_kind.setdefault(kind, [])
        numbers.append(number)
    return sorted(by_kind.values(), key=len, reverse=True)


def differing(groups: Sequence[Sequence[TrackedRun]]) -> list[str]:
    """The names of what differs among groups and must be equal for one ranking."""
    kinds = [run_kind(run) for runs in groups for run in runs]
    names = []
    for name, values in zip(NAMES, zip(*kinds, strict=True), strict=True):
        if len(Counter(values)) > 1:
            names.append(name)
    return names


def barrier(groups: Sequence[Sequence[TrackedRun]], together: bool) -> str | None:
    """What is to be said of runs that differ so; None where none do."""
    names = differing(groups) if groups else []
    if not names:
        return None
    shown = ", ".join(names)
    if together:
        return f"ranked together, though they differ in {shown}: a difference may come from that"
    count = len(strata(groups))
    return f"{count} rankings, as runs differ in {shown}; --together ranks them as one"
