"""Runs as lines of a list that fits the width of a terminal."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from orchestrator.status import Status

Cells = dict[str, str]  # what stands in each column, from left to right
GAP = "  "  # between two columns
_INDENT = "    "
_MOST_LINES = 3  # of a reason below its run
_DISPENSABLE = ("cluster", "attempt", "age")  # columns, in the order in which they make room
_AGES = ((86_400, "d"), (3600, "h"), (60, "m"))


def list_lines(runs: Sequence[Status], width: int) -> Iterator[str]:
    """The heading and the lines of a list of runs; a pure function.

    No run id is cut. Columns for which there is no room are left out. Reasons stand beside their runs where there is
    room for all of them, else below, in at most three lines each; `status` has the whole of it.
    """
    rows = [_cells(run) for run in runs]
    widths = _widths(rows)
    for name in _DISPENSABLE:
        if _total(widths) > width:
            del widths[name]
    room = width - _total(widths) - len(GAP)
    widest_reason = _widest_reason(rows)
    beside = widest_reason > 0 and max(widest_reason, len("reason")) <= room
    heading = {name: name for name in widths}
    if beside:
        heading["reason"] = "reason"
        widths["reason"] = room
    yield _filled_line(heading, widths)
    for cells in rows:
        yield _filled_line(cells, widths)
        reason = cells["reason"]
        if not beside:
            yield from _lines_below(reason, width)


def _widest_reason(rows: Sequence[Cells]) -> int:
    """How many columns reasons need."""
    widths = []
    for row in rows:
        widths.append(len(row["reason"]))
    return max(widths, default=0)


def _lines_below(reason: str, width: int) -> list[str]:
    """A reason in lines that are indented; words are broken where they are longer than a line alone."""
    return wrap(
        reason,
        width,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        max_lines=_MOST_LINES,
        placeholder=" …",
        break_on_hyphens=False,
    )


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
    number = len(widths)
    in_gaps = len(GAP) * (number - 1)
    in_cells = sum(widths.values())
    return in_cells + in_gaps


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
