"""Differences to the reference as a forest plot: a point and its interval for each row, as inline SVG."""

import math
from collections.abc import Sequence
from html import escape

from orchestrator.comparison.axis import FULL_WIDTH, Axis
from orchestrator.comparison.conclusion import shown_difference
from orchestrator.comparison.ranking import Ranked, Ranking

_ROW_HEIGHT = 26
_TOP, _BOTTOM = 10, 40
_LABELS = 330  # pixels that the names take
_RIGHT = 230  # pixels that the figures take, of losses up to 99
_MOST_ROWS = 60  # of more, the best
_LONGEST_NAME = 44  # characters
_SPACE = 0.06  # of the range of values, on each side
_TICK_GAP = 24
_FIGURES_GAP = 12  # pixels between plot and figures
_ZERO = 1e-12  # a tick that is zero but for rounding
_SVG = (
    '<figure><figcaption>{title}</figcaption><svg class="chart forest" role="img" aria-label="{title}" '
    'viewBox="0 0 {width} {height}">{content}</svg></figure>'
)
_ROW_NAME = '<text class="name" x="{x}" y="{y}" text-anchor="end">{name}</text>'
_FIGURES = '<text x="{x}" y="{y}">{figures}</text>'
_LINE = '<path class="{kind}" d="M{left:.1f} {y}H{right:.1f}"/>'
_UPRIGHT = '<path class="{kind}" d="M{x:.1f} {top}V{bottom}"/>'
_POINT = '<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="4.5"><title>{hint}</title></circle>'
_BAND = '<rect class="margin" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"/>'
_TICK = '<text x="{x:.1f}" y="{y}" text-anchor="middle">{value}</text>'
_BELOW = (
    '<p class="soft">Right of the line is better than {reference}. Intervals of 95 % that hold all at once; within '
    "the band, {margin} to each side, a row is as good. Grey: cannot be told apart.</p>"
)


def forest(ranking: Ranking) -> str:
    """The gains of a ranking's rows over its reference; empty where none has an interval."""
    shown = _drawn_rows(ranking)
    if not shown:
        return ""
    scale = _scale(ranking, shown)
    content = _background(ranking, scale, len(shown))
    for place, ranked in enumerate(shown):
        above = place * _ROW_HEIGHT
        y = _TOP + above + _ROW_HEIGHT // 2
        content += _row(ranking, ranked, scale, y)
    reference = escape(ranking.reference.label)
    title = f"{ranking.measure.title}: difference to {reference}"
    height = _TOP + len(shown) * _ROW_HEIGHT + _BOTTOM
    margin = shown_difference(ranking, ranking.margin)
    figure = _SVG.format(title=title, width=FULL_WIDTH, height=height, content=content)
    return figure + _BELOW.format(reference=reference, margin=margin)


def _drawn_rows(ranking: Ranking) -> list[Ranked]:
    """The rows that can be drawn, the best first."""
    shown = []
    for ranked in ranking.ranked:
        is_reference = ranked.finding == "reference"
        if not is_reference and math.isfinite(ranked.difference.error):
            shown.append(ranked)
    return shown[:_MOST_ROWS]


def _scale(ranking: Ranking, shown: Sequence[Ranked]) -> Axis:
    """The scale from left to right that holds all intervals, and none."""
    margin = ranking.margin
    values = [0.0, margin, -margin]
    for ranked in shown:
        values += ranking.gain(ranked)
    low = min(values)
    high = max(values)
    width = high - low
    space = _SPACE * width or 1.0
    start = _LABELS + _TICK_GAP
    end = FULL_WIDTH - _RIGHT
    return Axis(
        low - space,
        high + space,
        start,
        end,
        "{:g}".format,
    )


def _background(ranking: Ranking, scale: Axis, rows: int) -> str:
    """The band of what is as good, the line of no difference, and the ticks."""
    height = rows * _ROW_HEIGHT
    bottom = _TOP + height
    left = scale.at(-ranking.margin)
    right = scale.at(ranking.margin)
    width = right - left
    drawn = _BAND.format(x=left, y=_TOP, width=width, height=height)
    below = bottom + _TICK_GAP
    for tick in scale.ticks():
        x = scale.at(tick)
        is_none = abs(tick) < _ZERO
        kind = "base" if is_none else "grid"
        drawn += _UPRIGHT.format(kind=kind, x=x, top=_TOP, bottom=bottom)
        value = _without_unit(ranking, tick)
        drawn += _TICK.format(x=x, y=below, value=value)
    return drawn


def _row(ranking: Ranking, ranked: Ranked, scale: Axis, y: int) -> str:
    """The name of a row, its interval and point, and both as figures."""
    gain, low, high = ranking.gain(ranked)
    kind = ranked.finding.replace(" ", "-")
    label = ranked.contender.label
    name = label
    if len(label) > _LONGEST_NAME:
        shown = _LONGEST_NAME - 1
        name = label[:shown] + "…"
    baseline = y + 4
    estimate = _without_unit(ranking, gain)
    lower = _without_unit(ranking, low)
    upper = _without_unit(ranking, high)
    figures = f"{estimate} ({lower} to {upper})"
    hint = f"{label}: {figures}, {ranked.finding}"
    left = scale.at(low)
    right = scale.at(high)
    x = scale.at(gain)
    column = FULL_WIDTH - _RIGHT + _FIGURES_GAP
    escaped_name = escape(name)
    escaped_hint = escape(hint)
    drawn = _ROW_NAME.format(x=_LABELS, y=baseline, name=escaped_name)
    drawn += _LINE.format(kind=f"interval {kind}", left=left, right=right, y=y)
    drawn += _POINT.format(kind=f"estimate {kind}", x=x, y=y, hint=escaped_hint)
    drawn += _FIGURES.format(x=column, y=baseline, figures=figures)
    return drawn


def _without_unit(ranking: Ranking, value: float) -> str:
    """A difference as a bare number."""
    shown = shown_difference(ranking, value)
    number, _, _ = shown.partition(" ")
    return number
