"""What the rows of a comparison are called."""

from collections import Counter

from orchestrator.comparison.group import RunGroup
from orchestrator.comparison.run import TrackedRun

_LONGEST_LABEL = 60  # characters
_METHOD = "method."
_METHOD_KIND = "method.kind"


def labels_of(groups: list[RunGroup], columns: list[str]) -> list[str]:
    """A name for each group: the job's; where several share it, with what differs, else with the run id.

    Where all runs are of one job and have several methods, as in a sweep, a method's name stands in its place.
    """
    jobs = {run.name for group in groups for run in group}
    by_method = len(jobs) == 1 and _METHOD_KIND in columns
    if by_method:
        columns = [column for column in columns if column != _METHOD_KIND]
    short_columns = []
    for column in columns:
        is_option = column.startswith(_METHOD) and column != _METHOD_KIND
        if not is_option:
            short_columns.append(column)
    labels: dict[int, str] = {}
    for wanted in ([], short_columns, columns):
        names = []
        for group in groups:
            first = group[0]
            name = _job_names(group)
            if by_method:
                name = first.params.get(_METHOD_KIND, name)
            labelled = _with_differences(name, first, wanted)
            names.append(labelled)
        for place in _clear_places(names):
            name = names[place]
            labels.setdefault(place, name)
    found = []
    for place, group in enumerate(groups):
        first = group[0]
        run_id = first.run_id
        label = labels.get(place, run_id)
        found.append(label)
    return found


def _clear_places(names: list[str]) -> list[int]:
    """The places of names that are short, and of which there is one alone."""
    counts = Counter(names)
    places = []
    for place, name in enumerate(names):
        is_single = counts[name] == 1
        if is_single and len(name) <= _LONGEST_LABEL:
            places.append(place)
    return places


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
