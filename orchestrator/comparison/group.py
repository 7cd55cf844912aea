"""Which runs of a comparison are one row: those that differ in nothing but the seed."""

from collections import Counter

from orchestrator.comparison.run import TrackedRun

RunGroup = list[TrackedRun]  # runs that are alike
Configuration = tuple[str | None, ...]  # state and params of a run
SEED = "train.seed"


def groups_of(runs: list[TrackedRun], columns: list[str]) -> list[RunGroup]:
    """The runs that are alike in state and in all columns, together, in the order of the runs.

    A run whose seed a group has already goes into another one: runs that repeat each other show no spread.
    """
    groups: dict[tuple[Configuration, int], RunGroup] = {}
    repetitions: Counter[Configuration] = Counter()
    for run in runs:
        values = map(run.params.get, columns)
        configuration = (run.state, *values)
        with_seed = (*configuration, run.params.get(SEED))
        key = (configuration, repetitions[with_seed])
        repetitions[with_seed] += 1
        group = groups.setdefault(key, [])
        group.append(run)
    return list(groups.values())
