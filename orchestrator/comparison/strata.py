"""A barrier: runs of other data, another budget or other software are not in one ranking, unless somebody says so.

Scores drift when libraries are renewed, also of the very same job, by more than methods differ. What differs is
said; those that differ get a ranking of their own.
"""

from collections.abc import Sequence

from orchestrator.comparison.run import TrackedRun

RunsByRow = Sequence[Sequence[TrackedRun]]
RunKind = tuple[str, ...]  # what must be equal for one ranking, in the order of its names
_DATA = ("data.train_digest", "data.eval_digest", "evaluation.rows", "evaluation.test", "base_digest")
_DEFAULTS = {"evaluation.test": "0.0"}  # which runs before 2026-11-30 did not say
_BUDGET = ("train.steps", "train.epochs", "train.batch_tokens")
_SOFTWARE = ("fleetune.version", "fleetune.env.torch", "fleetune.env.transformers", "fleetune.env.peft")
_TOGETHER = "ranked together, though they differ in {names}: a difference may come from that"
_APART = "{count} rankings, as runs differ in {names}; --together ranks them as one"
NAMES = (*_DATA, *_BUDGET, *_SOFTWARE)


def run_kind(run: TrackedRun) -> RunKind:
    """What of a run must be equal for one ranking."""
    values = []
    for name in NAMES:
        value = run.params.get(name)
        if value is None:
            value = run.tags.get(name, "")
        if value == _DEFAULTS.get(name):
            value = ""
        values.append(value)
    return tuple(values)


def strata(groups: RunsByRow) -> list[list[int]]:
    """The numbers of groups of runs that may be ranked together; the largest stratum first."""
    by_kind: dict[RunKind, list[int]] = {}
    for number, runs in enumerate(groups):
        first = runs[0]
        kind = run_kind(first)
        numbers = by_kind.setdefault(kind, [])
        numbers.append(number)
    parts = list(by_kind.values())
    parts.sort(key=len, reverse=True)
    return parts


def differing(groups: RunsByRow) -> list[str]:
    """The names of what differs among groups and must be equal for one ranking."""
    values_of: dict[str, set[str]] = {}
    for runs in groups:
        for run in runs:
            kind = run_kind(run)
            for name, value in zip(NAMES, kind, strict=True):
                values = values_of.setdefault(name, set())
                values.add(value)
    names = []
    for name, values in values_of.items():
        if len(values) > 1:
            names.append(name)
    return names


def barrier(groups: RunsByRow, together: bool) -> str | None:
    """What is to be said of runs that differ so; None where none do."""
    names = differing(groups)
    if not names:
        return None
    shown = ", ".join(names)
    if together:
        return _TOGETHER.format(names=shown)
    parts = strata(groups)
    count = len(parts)
    return _APART.format(count=count, names=shown)
