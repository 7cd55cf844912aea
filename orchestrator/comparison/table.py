"""The comparison as a table for a terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.comparison.compare import Comparison, Row, shown
from orchestrator.comparison.measure import Measure

_LEFT_OUT = {"best_loss", "tokens_per_second"}  # in the report and the JSON; a terminal is narrow
_COLUMNS = 3  # more differences than this share one column
_LONGEST = 28  # characters of a param's value
_STYLES = {"FINISHED": "", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}


def table(comparison: Comparison) -> Table:
    """One line per row; few differences each in a column, more of them together in one."""
    apart = len(comparison.columns) <= _COLUMNS
    made = Table(title=escape(comparison.title), caption=_caption(comparison), caption_justify="left")
    made.box, made.pad_edge, made.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
    made.add_column("run", overflow="fold")
    for heading in _headings(comparison, apart):
        made.add_column(escape(heading), overflow="fold")
    measures = [measure for measure in comparison.measures if measure.key not in _LEFT_OUT]
    for measure in measures:
        made.add_column(measure.title.replace(" ", "\n"), justify="right", no_wrap=True)
    if any(row.status != "FINISHED" for row in comparison.rows):
        made.add_column("status", no_wrap=True)
    for row in comparison.rows:
        figures = [cell(row, measure, "\n") for measure in measures]
        texts = [row.label + _seeds(comparison, row), *_differences(comparison, row, apart), *figures]
        made.add_row(*map(escape, [*texts, row.status.lower()][: len(made.columns)]), style=_STYLES.get(row.status))
    return made


def cell(row: Row, measure: Measure, joint: str = " ") -> str:
    """A measure of a row, with its spread when the row has several runs that differ in it."""
    figure = row.figure(measure.key)
    if figure is None:
        return "-"
    spread = f"{joint}± {measure.show(figure.std)}" if figure.std else ""
    return measure.show(figure.mean) + spread


def _caption(comparison: Comparison) -> str | None:
    if len(comparison.rows) == 1:
        return None
    same = (f"{key}={_clip(shown(key, value))}" for key, value in comparison.constant.items())
    return escape(f"the same for all: {', '.join(same)}")


def _headings(comparison: Comparison, apart: bool) -> list[str]:
    if not comparison.columns:
        return []
    return [comparison.heading(key) for key in comparison.columns] if apart else ["differences"]


def _differences(comparison: Comparison, row: Row, apart: bool) -> list[str]:
    if not comparison.columns:
        return []
    if apart:
        return [_clip(shown(key, row.differences[key])) or "-" for key in comparison.columns]
    told = {comparison.heading(key): shown(key, value) for key, value in row.differences.items() if value}
    return ["\n".join(f"{heading}={_clip(value)}" for heading, value in told.items())]


def _seeds(comparison: Comparison, row: Row) -> str:
    """The seeds, below the name, where there are several."""
    if len(row.runs) > 1:
        return f"\nseeds {', '.join(row.seeds)}" if len(row.runs) <= 3 else f"\n{len(row.runs)} seeds"
    single = {other.seeds[0] for other in comparison.rows if len(other.runs) == 1}
    return f"\nseed {row.seeds[0]}" if len(single) > 1 else ""


def _clip(text: str) -> str:
    """A long text without its middle: of a path the end says more."""
    return text if len(text) <= _LONGEST else f"{text[:8]}…{text[9 - _LONGEST :]}"
