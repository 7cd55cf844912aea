"""Quality against the learning rate, for each method that was run at several: who was not tuned is seen at once."""

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter

from orchestrator.comparison.chart import FULL_WIDTH, Line, Point, line_chart
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.row import ComparisonRow

RATE = "train.lr"
_METHOD_PARAM = "method.kind"
_FEWEST = 2  # rates of a method
_RATES_NOTE = (
    '<p class="soft">One line for each configuration but for its rate, at the mean over seeds. Where it is best at '
    "an end, what lies beyond was not tried.</p>"
)
RowsOfConfiguration = Sequence[tuple[float, ComparisonRow]]  # by the rate


def rate_chart(comparison: Comparison) -> str:
    """The chart of quality against rate; empty where nothing was run at several rates."""
    quality = comparison.quality
    lines = []
    for group, (label, rows) in enumerate(_by_configuration(comparison)):
        points: list[Point] = []
        for rate, row in sorted(rows, key=itemgetter(0)):
            metric = row.metric(quality.key)
            if metric is None:
                continue
            logarithm = math.log10(rate)
            point = (logarithm, metric.mean)
            points.append(point)
        if len(points) >= _FEWEST:
            lines.append(Line(label, group, points))
    if not lines:
        return ""
    subject = quality.title.capitalize()
    title = f"{subject} against learning rate"
    chart = line_chart(title, lines, "learning rate", quality.show, quality.bounds, FULL_WIDTH, _as_rate, marked=True)
    return f"<h2>Learning rates</h2>{chart}{_RATES_NOTE}"


def _by_configuration(comparison: Comparison) -> Iterator[tuple[str, RowsOfConfiguration]]:
    """The rows that succeeded, by all in which they differ but the rate, with a name of that."""
    found: dict[tuple[tuple[str, str], ...], list[tuple[float, ComparisonRow]]] = {}
    if RATE not in comparison.columns:
        return
    for row in comparison.rows:
        rate = row.differences.get(RATE)
        if row.state != "succeeded" or not rate or float(rate) <= 0:
            continue
        others = dict(row.differences)
        others.pop(RATE)
        key = tuple(others.items())
        of_configuration = found.setdefault(key, [])
        pair = (float(rate), row)
        of_configuration.append(pair)
    for rows in found.values():
        _, first = rows[0]
        label = first.differences.get(_METHOD_PARAM)
        if not label:
            label = first.label
        yield label, rows


def _as_rate(logarithm: float) -> str:
    """The rate of a logarithm, as people write it."""
    rate = 10**logarithm
    text = f"{rate:.1e}"
    return text.replace("e-0", "e-")
