"""What stands in the lines of a comparison in a terminal: measures, differences, seeds, and what all rows share."""

import math
from collections.abc import Iterator

from orchestrator.comparison.compare import Comparison, display_value
from orchestrator.comparison.measure import Measure
from orchestrator.comparison.row import ComparisonRow

STYLES = {"failed": "red", "cancelled": "yellow", "running": "cyan"}  # of rows, by their state
_LEFT_OUT = {"best_loss", "tokens_per_second"}  # in the report and the JSON; a terminal is narrow
_MOST_SEEDS = 3  # of more, only the number is shown
_LONGEST_VALUE_SHOWN = 28  # characters of a param's value


def shown_measures(comparison: Comparison) -> list[Measure]:
    """The measures that a terminal shows."""
    measures = []
    for measure in comparison.measures:
        if measure.key not in _LEFT_OUT:
            measures.append(measure)
    return measures


def has_unfinished(comparison: Comparison) -> bool:
    """Whether some rows have not succeeded, so that states must be shown."""
    finished = [row.state == "succeeded" for row in comparison.rows]
    return not all(finished)


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


def measure_cells(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """The measures of a row, each with its spread below; and its state, where states are shown."""
    cells = []
    if comparison.shows_ranks:
        cells.append(gap_text(comparison, row))
    for measure in shown_measures(comparison):
        text = cell(row, measure, "\n")
        cells.append(text)
    if has_unfinished(comparison):
        cells.append(row.state)
    return cells


def difference_heading(comparison: Comparison) -> str:
    """What stands above the differences to the reference."""
    first = comparison.rankings[0]
    reference = first.reference.label
    return f"against {reference}"


def gap_text(comparison: Comparison, row: ComparisonRow) -> str:
    """By how much a row is better than the reference of its ranking, and below it the interval of that."""
    place = comparison.place_of(row)
    if place is None:
        return "-"
    ranking, ranked = place
    if ranked.finding == "reference":
        return "reference"
    if not math.isfinite(ranked.difference.error):
        return "one seed" if ranked.difference.seeds == 1 else "seeds alike"
    gain, low, high = ranking.gain(ranked)
    estimate = _with_sign(ranking.measure, gain)
    lower = _with_sign(ranking.measure, low)
    upper = _with_sign(ranking.measure, high)
    return f"{estimate}\n{lower} to {upper}"


def _with_sign(measure: Measure, difference: float) -> str:
    """A difference with its sign: of shares in points."""
    if measure.is_share_of_rows:
        points = 100 * difference
        return f"{points:+.1f}"
    return f"{difference:+.4f}"


def rank_text(comparison: Comparison, row: ComparisonRow) -> str:
    """The rank of a row, shared by all that are not shown worse than the best of them; empty where it has none."""
    place = comparison.place_of(row)
    if place is None or not comparison.shows_ranks:
        return ""
    _, ranked = place
    return f"{ranked.rank}. "


def remarks(comparison: Comparison) -> list[str]:
    """The verdict, and what keeps rows apart."""
    found = (comparison.verdict, comparison.barrier)
    return list(filter(None, found))


def caption(comparison: Comparison) -> str | None:
    """What is the same for all rows, where there are several."""
    if len(comparison.rows) == 1:
        return None
    facts = []
    for param, value in comparison.constant.items():
        text = _value(param, value)
        facts.append(f"{param}={text}")
    joined = ", ".join(facts)
    return f"the same for all: {joined}"


def differing_values(comparison: Comparison, row: ComparisonRow) -> Iterator[tuple[str, str]]:
    """The heading of each param in which rows differ, and its value in a row; empty where that has none."""
    for param in comparison.columns:
        heading = comparison.heading(param)
        value = _value(param, row.differences[param])
        yield heading, value


def seeds_text(comparison: Comparison, row: ComparisonRow) -> str:
    """The seeds of a row, where there are several in it or among single ones."""
    number = len(row.runs)
    if number > _MOST_SEEDS:
        return f"{number} seeds"
    if number > 1:
        seeds = ", ".join(row.seeds)
        return f"seeds {seeds}"
    single_seeds: set[str] = set()
    for other in comparison.rows:
        if len(other.runs) == 1:
            single_seeds.update(other.seeds)
    if len(single_seeds) < 2:
        return ""
    return f"seed {row.seeds[0]}"


def _value(param: str, value: str) -> str:
    """A param's value, short enough for a terminal."""
    return _clipped(display_value(param, value))


def _clipped(text: str) -> str:
    """A long text without its middle: of a path the end says more."""
    if len(text) <= _LONGEST_VALUE_SHOWN:
        return text
    begin = text[:8]
    end = text[9 - _LONGEST_VALUE_SHOWN :]
    return f"{begin}…{end}"
