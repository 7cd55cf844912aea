"""What the rows of a comparison are called."""

from collections import Counter

from orchestrator.comparison.run import TrackedRun

RunGroup = list[TrackedRun]  # runs that are alike
_LONGEST_LABEL = 60  # characters


def labels_of(groups: list[RunGroup], columns: list[str]) -> list[str]:
    """A name for each group: the job's; where several share it, with what differs, else with the run id."""
    names = [_job_names(group) for group in groups]
    name_counts = Counter(names)
    long_names = []
    for name, group in zip(names, groups, strict=True):
        long_name = _with_differences(name, group[0], columns)
        long_names.append(long_name)
    long_name_counts = Counter(long_names)
    labels = []
    for name, long_name, group in zip(names, long_names, groups, strict=True):
        if name_counts[name] == 1:
            labels.append(name)
            continue
        is_short = len(long_name) <= _LONGEST_LABEL
        if is_short and long_name_counts[long_name] == 1:
            labels.append(long_name)
        else:
            first = group[0]
            labels.append(first.run_id)
    return labels


def _job_names(group: RunGroup) -> str:
    """The name of the job, or the names of all jobs, of which the runs of a group are."""
    names = {run.name for run in group}
    return " / ".join(sorted(names))


def _with_differences(name: str, run: TrackedRun, columns: list[str]) -> str:
    """A name with the values in which its runs differ from others."""
    if not columns:
        return name
    values = map(run.params.get, columns)
    differences = ", ".join(filter(None, values))
    return f"{name} ({differences})"
