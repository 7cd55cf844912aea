"""The comparison for a terminal that is too narrow for its table: a row has a line for its name, one for measures."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from rich.console import Group
from rich.text import Text

from orchestrator.comparison.cells import (
    STYLES,
    caption,
    difference_heading,
    differing_values,
    has_unfinished,
    measure_cells,
    rank_text,
    seeds_text,
    shown_measures,
)
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.row import ComparisonRow

_GAP = "  "
_FACT_INDENT = "    "


def narrow_table(comparison: Comparison, width: int) -> Group:
    """The measures of all rows below one heading, and above those of each row its name and what it differs in."""
    headings = _headings(comparison)
    columns = [headings]
    for row in comparison.rows:
        measures = measure_cells(comparison, row)
        columns.append(measures)
    widths = []
    for cells in zip(*columns, strict=True):
        widths.append(max(map(_width, cells)))
    lines = [Text(comparison.title, style="italic")]
    for line in _aligned(headings, widths):
        lines.append(Text(line, style="bold"))
    for row, measures in zip(comparison.rows, columns[1:], strict=True):
        style = STYLES.get(row.state, "")
        of_row = [*_name_lines(comparison, row, width), *_aligned(measures, widths)]
        shown = [Text(line, style=style) for line in of_row]
        shown[0].stylize("bold", end=len(row.label))
        lines += shown
    shared = caption(comparison)
    if shared:
        lines.append(Text(f"\n{shared}", style="dim italic"))
    return Group(*lines)


def _headings(comparison: Comparison) -> list[str]:
    """What stands above each column, in two lines of which the first may be empty."""
    titles = []
    for measure in shown_measures(comparison):
        titles.append(measure.title)
    if comparison.shows_ranks:
        titles.insert(0, difference_heading(comparison))
    if has_unfinished(comparison):
        titles.append("state")
    headings = []
    for title in titles:
        above, _, below = title.rpartition(" ")
        headings.append(f"{above}\n{below}")
    return headings


def _width(cell_text: str) -> int:
    """The columns of a cell of several lines."""
    lines = cell_text.split("\n")
    return max(map(len, lines))


def _aligned(cells: Iterable[str], widths: Sequence[int]) -> Iterator[str]:
    """The lines of cells side by side, each at the right of its column."""
    columns = []
    for cell_text in cells:
        columns.append(cell_text.split("\n"))
    for texts in zip_longest(*columns, fillvalue=""):
        line = ""
        for text, width in zip(texts, widths, strict=True):
            line += _GAP + text.rjust(width)
        yield line.rstrip()


def _name_lines(comparison: Comparison, row: ComparisonRow, width: int) -> Iterator[str]:
    """The name of a row and what it differs in, in lines that break none of these."""
    facts = [seeds_text(comparison, row)]
    for heading, value in differing_values(comparison, row):
        if value:
            facts.append(f"{heading}={value}")
    line = rank_text(comparison, row) + row.label
    for fact in filter(None, facts):
        longer = f"{line}{_GAP}{fact}"
        if len(longer) <= width:
            line = longer
            continue
        yield line
        line = f"{_FACT_INDENT}{fact}"
    yield line
