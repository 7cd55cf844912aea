"""The comparison as a table for a terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.comparison.compare import Comparison, ComparisonRow, display_value
from orchestrator.comparison.measure import Measure

_LEFT_OUT = {"best_loss", "tokens_per_second"}  # in the report and the JSON; a terminal is narrow
_MOST_COLUMNS = 3  # more differences than this share one column
_MOST_SEEDS = 3  # of more, only the number is shown
_LONGEST_VALUE_SHOWN = 28  # characters of a param's value
_STYLES = {"FINISHED": "", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}


def table(comparison: Comparison) -> Table:
    """One line per row; few differences each in a column, more of them together in one."""
    title = escape(comparison.title)
    caption = _caption(comparison)
    grid = Table(title=title, caption=caption, caption_justify="left")
    grid.box = box.SIMPLE_HEAD
    grid.pad_edge = False
    grid.padding = (0, 1, 0, 0)
    grid.add_column("run", overflow="fold")
    for heading in _headings(comparison):
        grid.add_column(escape(heading), overflow="fold")
    measures = []
    for measure in comparison.measures:
        if measure.key in _LEFT_OUT:
            continue
        measures.append(measure)
        heading = measure.title.replace(" ", "\n")
        grid.add_column(heading, justify="right", no_wrap=True)
    states = {row.status for row in comparison.rows}
    unfinished = states - {"FINISHED"}
    if unfinished:
        grid.add_column("status", no_wrap=True)
    for row in comparison.rows:
        seeds = _seeds(comparison, row)
        cells = [row.label + seeds]
        cells += _differences(comparison, row)
        for measure in measures:
            text = cell(row, measure, "\n")
            cells.append(text)
        if unfinished:
            cells.append(row.status.lower())
        style = _STYLES.get(row.status)
        grid.add_row(*map(escape, cells), style=style)
    return grid


def cell(row: ComparisonRow, measure: Measure, joint: str = " ") -> str:
    """A measure of a row, with its spread when the row has several runs that differ in it."""
    metric = row.metric(measure.key)
    if metric is None:
        return "-"
    mean = measure.show(metric.mean)
    if not metric.std:
        return mean
    spread = measure.show(metric.std)
    return f"{mean}{joint}± {spread}"


def _caption(comparison: Comparison) -> str | None:
    """What is the same for all rows, where there are several."""
    if len(comparison.rows) == 1:
        return None
    facts = []
    for param, value in comparison.constant.items():
        text = _value(param, value)
        facts.append(f"{param}={text}")
    joined = ", ".join(facts)
    return escape(f"the same for all: {joined}")


def _are_apart(comparison: Comparison) -> bool:
    """Whether each difference has a column of its own."""
    return len(comparison.columns) <= _MOST_COLUMNS


def _headings(comparison: Comparison) -> list[str]:
    """The headings of the columns with differences."""
    if _are_apart(comparison):
        return list(map(comparison.heading, comparison.columns))
    return ["differences"]


def _differences(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """The cells of a row in the columns with differences."""
    cells = []
    by_heading = {}
    for param in comparison.columns:
        value = _value(param, row.differences[param])
        cells.append(value or "-")
        if value:
            heading = comparison.heading(param)
            by_heading[heading] = f"{heading}={value}"
    if _are_apart(comparison):
        return cells
    return ["\n".join(by_heading.values())]


def _value(param: str, value: str) -> str:
    """A param's value, short enough for a terminal."""
    return _clipped(display_value(param, value))


def _seeds(comparison: Comparison, row: ComparisonRow) -> str:
    """The seeds, below the name, where there are several."""
    number = len(row.runs)
    if number > _MOST_SEEDS:
        return f"\n{number} seeds"
    if number > 1:
        seeds = ", ".join(row.seeds)
        return f"\nseeds {seeds}"
    single_seeds: set[str] = set()
    for other in comparison.rows:
        if len(other.runs) == 1:
            single_seeds.update(other.seeds)
    if len(single_seeds) < 2:
        return ""
    return f"\nseed {row.seeds[0]}"


def _clipped(text: str) -> str:
    """A long text without its middle: of a path the end says more."""
    if len(text) <= _LONGEST_VALUE_SHOWN:
        return text
    begin = text[:8]
    end = text[9 - _LONGEST_VALUE_SHOWN :]
    return f"{begin}…{end}"
