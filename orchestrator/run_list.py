"""Runs as lines of a list that fits the width of a terminal."""

from collections.abc import Iterator, Sequence

from orchestrator.status import Status

Cells = dict[str, str]  # what stands in each column, from left to right
GAP = "  "  # between two columns
_LEAST_REASON = 30  # columns; where less is left, a reason has a line of its own
_INDENT = "    "
_DISPENSABLE = ("cluster", "attempt", "age")  # columns, in the order in which they make room
_AGES = ((86_400, "d"), (3600, "h"), (60, "m"))


def list_lines(runs: Sequence[Status], width: int) -> Iterator[str]:
    """The heading and the lines of a list of runs; a pure function.

    No run id is cut. Columns for which there is no room are left out. A reason stands beside its run where there is
    room, else below it; `status` has the whole of it.
    """
    rows = [_cells(run) for run in runs]
    widths = _widths(rows)
    for name in _DISPENSABLE:
        if _total(widths) > width:
            del widths[name]
    room = width - _total(widths) - len(GAP)
    beside = room >= _LEAST_REASON
    heading = {name: name for name in widths}
    if beside:
        heading["reason"] = "reason"
        widths["reason"] = room
    yield _filled_line(heading, widths)
    for cells in rows:
        yield _filled_line(cells, widths)
        reason = cells["reason"]
        if reason and not beside:
            room_below = width - len(_INDENT)
            yield _INDENT + _fitted(reason, room_below)


def age(seconds: float) -> str:
    """How long ago something was, in the largest unit that it fills: 12 d, 3 h, 5 m, 0 m."""
    for unit_s, unit in _AGES:
        if seconds >= unit_s:
            number = int(seconds // unit_s)
            return f"{number} {unit}"
    return "0 m"


def _cells(run: Status) -> Cells:
    steps = run.steps or "?"
    words = (run.reason or "").split()
    since = "?"  # where its folder cannot be read
    if run.submitted:
        since = age(run.looked_at - run.submitted)
    return {
        "run": run.run_id,
        "state": run.state,
        "step": f"{run.step}/{steps}",
        "attempt": str(run.attempt),
        "age": since,
        "cluster": run.cluster,
        "reason": " ".join(words),
    }


def _widths(rows: Sequence[Cells]) -> dict[str, int]:
    """How wide each column is but the reason, which gets what is left."""
    widths: dict[str, int] = {}
    for row in rows:
        for name, cell in row.items():
            widest = widths.get(name, len(name))
            widths[name] = max(widest, len(cell))
    del widths["reason"]
    return widths


def _total(widths: dict[str, int]) -> int:
    """How wide a line of all columns is."""
    gaps = len(widths) - 1
    return sum(widths.values()) + len(GAP) * gaps


def _filled_line(cells: Cells, widths: dict[str, int]) -> str:
    """The cells of a line, each in the width of its column."""
    filled = []
    for name, width in widths.items():
        cell = cells[name]
        text = _fitted(cell, width)
        padded = text.ljust(width)
        filled.append(padded)
    line = GAP.join(filled)
    return line.rstrip()


def _fitted(text: str, width: int) -> str:
    """A text that fits a width."""
    if len(text) <= width:
        return text
    kept = text[: width - 1]
    return f"{kept}…"
