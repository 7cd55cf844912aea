"""The comparison as a table for a terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.compare import Comparison, Measure, Row

_LEFT_OUT = {"best_loss"}  # in the report and the JSON; a terminal is narrow
_STYLES = {"FINISHED": "", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}


def table(comparison: Comparison, apart: bool) -> Table:
    """One line per row; the differences each in a column, or (not `apart`) together in one."""
    caption = ", ".join(f"{key}={value}" for key, value in comparison.constant.items())
    made = Table(
        title=escape(comparison.title),
        caption=f"the same for all: {escape(caption)}" if len(comparison.rows) > 1 else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    made.add_column("run", overflow="fold", min_width=8)
    for heading in _headings(comparison, apart):
        made.add_column(escape(heading), overflow="fold")
    made.add_column("seeds")
    measures = [measure for measure in comparison.measures if measure.key not in _LEFT_OUT]
    for measure in measures:
        made.add_column(measure.title, justify="right")
    if any(row.status != "FINISHED" for row in comparison.rows):
        made.add_column("status", no_wrap=True)
    for row in comparison.rows:
        figures = [cell(row, measure, "\n") for measure in measures]
        texts = [row.label, *_differences(comparison, row, apart), _seeds(row), *figures, row.status.lower()]
        made.add_row(*(escape(text) for text in texts[: len(made.columns)]), style=_STYLES.get(row.status, ""))
    return made


def cell(row: Row, measure: Measure, joint: str = " ") -> str:
    """A measure of a row, with its spread when the row has several runs."""
    figure = row.figure(measure.key)
    if figure is None:
        return "-"
    spread = f"{joint}± {measure.show(figure.std)}" if figure.n > 1 else ""
    return measure.show(figure.mean) + spread


def _headings(comparison: Comparison, apart: bool) -> list[str]:
    if not comparison.columns:
        return []
    return [comparison.heading(key) for key in comparison.columns] if apart else ["differences"]


def _differences(comparison: Comparison, row: Row, apart: bool) -> list[str]:
    if not comparison.columns:
        return []
    if apart:
        return [row.differences[key] or "-" for key in comparison.columns]
    return ["\n".join(f"{comparison.heading(key)}={value}" for key, value in row.differences.items() if value)]


def _seeds(row: Row) -> str:
    return ", ".join(row.seeds) if len(row.runs) <= 3 else f"{len(row.runs)} runs"
