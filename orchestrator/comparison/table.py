"""The comparison as a table for a terminal."""

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.comparison.cells import (
    STYLES,
    caption,
    difference_heading,
    differing_values,
    has_unfinished,
    measure_cells,
    rank_text,
    remarks,
    seeds_text,
    shown_measures,
)
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.narrow import narrow_table
from orchestrator.comparison.row import ComparisonRow

_MOST_COLUMNS = 3  # of differences


def table(comparison: Comparison, width: int) -> Group:
    """A comparison for a terminal this wide: its rows, and below them the verdict."""
    lines = []
    for remark in remarks(comparison):
        lines.append(Text(remark))
    return Group(_all_rows(comparison, width), *lines)


def _all_rows(comparison: Comparison, width: int) -> Table | Group:
    """A line for each row, or several where that has not room for a table."""
    if len(comparison.columns) <= _MOST_COLUMNS:
        grid = _grid(comparison)
        endless = Console(width=10_000)
        needed = Measurement.get(endless, endless.options, grid)
        if needed.maximum <= width:
            return grid
    return narrow_table(comparison, width)


def _grid(comparison: Comparison) -> Table:
    """One row of a table for each row, with a column for each difference and each measure."""
    title = escape(comparison.title)
    shared = caption(comparison)
    if shared:
        shared = escape(shared)
    grid = Table(title=title, caption=shared, caption_justify="left")
    grid.box = box.SIMPLE_HEAD
    grid.pad_edge = False
    grid.padding = (0, 1, 0, 0)
    headings = map(comparison.heading, comparison.columns)
    for heading in ("run", *headings):
        grid.add_column(escape(heading))
    if comparison.shows_ranks:
        heading = difference_heading(comparison).replace(" ", "\n")
        grid.add_column(escape(heading), justify="right")
    for measure in shown_measures(comparison):
        heading = measure.title.replace(" ", "\n")
        grid.add_column(heading, justify="right")
    if has_unfinished(comparison):
        grid.add_column("state")
    for row in comparison.rows:
        cells = _row_cells(comparison, row)
        style = STYLES.get(row.state)
        grid.add_row(*map(escape, cells), style=style)
    return grid


def _row_cells(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """The cells of a row, from left to right; the seeds stand below the name."""
    name = rank_text(comparison, row) + row.label
    seeds = seeds_text(comparison, row)
    if seeds:
        name += f"\n{seeds}"
    cells = [name]
    for _, value in differing_values(comparison, row):
        cells.append(value or "-")
    return cells + measure_cells(comparison, row)
