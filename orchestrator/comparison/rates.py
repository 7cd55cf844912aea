"""Quality against the learning rate, for each method that was run at several: who was not tuned is seen at once."""

import math
from collections import Counter
from dataclasses import dataclass
from html import escape
from operator import itemgetter

from orchestrator.comparison import svg
from orchestrator.comparison.axis import FULL_WIDTH
from orchestrator.comparison.chart import Line, Point, line_chart
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.row import ComparisonRow

RATE = "train.lr"
_METHOD_PARAM = "method.kind"
_FEWEST = 2  # rates of a method
_RATES_NOTE = (
    '<p class="soft">One line for each configuration but for its rate, at the mean over seeds. Where it is best at '
    "an end, what lies beyond was not tried.</p>"
)
_LEGEND = '<ul class="legend">{items}</ul>'
_LEGEND_ITEM = '<li data-of="{group}">{swatch}{label}</li>'


@dataclass
class TriedRates:
    """A configuration but for its rate: its name, the number of its first row, and each rate with its row."""

    label: str
    group: int
    tried: list[tuple[float, ComparisonRow]]


def rate_chart(comparison: Comparison) -> str:
    """The chart of quality against rate; empty where nothing was run at several rates."""
    quality = comparison.quality
    lines = []
    items = ""
    for configuration in _configurations(comparison):
        points: list[Point] = []
        for rate, row in sorted(configuration.tried, key=itemgetter(0)):
            metric = row.metric(quality.key)
            if metric is None:
                continue
            logarithm = math.log10(rate)
            point = (logarithm, metric.mean)
            points.append(point)
        if len(points) < _FEWEST:
            continue
        group = configuration.group
        label = configuration.label
        lines.append(Line(label, group, points))
        swatch = svg.swatch(group)
        items += _LEGEND_ITEM.format(group=group, swatch=swatch, label=escape(label))
    if not lines:
        return ""
    subject = quality.title.capitalize()
    title = f"{subject} against learning rate"
    chart = line_chart(title, lines, "learning rate", quality.show, quality.bounds, FULL_WIDTH, _as_rate, marked=True)
    legend = _LEGEND.format(items=items)
    return f"<h2>Learning rates</h2>{chart}{legend}{_RATES_NOTE}"


def _configurations(comparison: Comparison) -> list[TriedRates]:
    """The rows that succeeded, by all in which they differ but the rate; named by their method if that is clear."""
    found: dict[tuple[tuple[str, str], ...], TriedRates] = {}
    if RATE not in comparison.columns:
        return []
    for number, row in enumerate(comparison.rows):
        others = dict(row.differences)
        rate = others.pop(RATE)
        if row.state != "succeeded" or not rate or float(rate) <= 0:
            continue
        key = tuple(others.items())
        configuration = found.setdefault(key, TriedRates(row.label, number, []))
        pair = (float(rate), row)
        configuration.tried.append(pair)
    methods = Counter(dict(key).get(_METHOD_PARAM, "") for key in found)
    for key, configuration in found.items():
        method = dict(key).get(_METHOD_PARAM, "")
        if method and methods[method] == 1:
            configuration.label = method
    return list(found.values())


def _as_rate(logarithm: float) -> str:
    """The rate of a logarithm, as people write it."""
    rate = 10**logarithm
    text = f"{rate:.1e}"
    return text.replace("e-0", "e-")
