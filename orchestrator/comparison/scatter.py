"""Points of quality against cost as inline SVG, with their Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.comparison import svg
from orchestrator.comparison.axis import (
    BOTTOM,
    HALF_WIDTH,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Bounds,
    FormatValue,
    x_axis,
    y_axis,
)
from orchestrator.comparison.chart import Point, Points, frame
from orchestrator.comparison.dot_labels import Box, DotLabel, placed

_SCATTER_MARGIN = 0.12  # of the range of values, on each side
_LONGEST_DOT_LABEL = 30  # characters


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot. `front`: no other is better in both.

    `low` to `high` is the interval of y, `left` to `right` that of x, where they are known.
    """

    label: str
    group: int
    x: float
    y: float
    front: bool
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None


def scatter(
    title: str, dots: Sequence[Dot], x_title: str, unit: float, shows: tuple[FormatValue, FormatValue], bounds: Bounds
) -> str:
    """Points, those on the front filled and joined; labels where there is space."""
    x_show, y_show = shows
    costs = []
    qualities = []
    for dot in dots:
        costs.append(dot.x)
        qualities.append(dot.y)
        if dot.low is not None and dot.high is not None:
            qualities.append(dot.low)
            qualities.append(dot.high)
        if dot.left is not None and dot.right is not None:
            costs.append(dot.left)
            costs.append(dot.right)
    x = x_axis(costs, HALF_WIDTH, x_show, _SCATTER_MARGIN)
    x = replace(x, unit=unit)
    y = y_axis(qualities, y_show, bounds, _SCATTER_MARGIN)
    front = _front(dots)
    drawn = _joined(front, x, y)
    for dot in dots:
        drawn += _dot(dot, x, y)
    for label in _labels(dots, x, y):
        drawn += svg.name(label.x, label.y, label.anchor, label.text)
    return frame(title, x, y, x_title, drawn)


def _front(dots: Sequence[Dot]) -> list[Point]:
    """The points on the front, the cheapest first."""
    points = []
    for dot in dots:
        if dot.front:
            points.append((dot.x, dot.y))
    return sorted(points)


def _joined(front: Points, x: Axis, y: Axis) -> str:
    """The line through the points of the front, where there are several."""
    if len(front) < 2:
        return ""
    points = []
    for cost, quality in front:
        at_x = x.at(cost)
        at_y = y.at(quality)
        points.append(f"{at_x:.1f},{at_y:.1f}")
    return svg.front(points)


def _dot(dot: Dot, x: Axis, y: Axis) -> str:
    quality = y.show(dot.y)
    cost = x.show(dot.x)
    hint = f"{dot.label}: {quality} at {cost}"
    if dot.front:
        hint += ", on the front"
    at_x = x.at(dot.x)
    at_y = y.at(dot.y)
    drawn = _error_bars(dot, x, y)
    drawn += svg.dot(at_x, at_y, dot.group, dot.front, hint)
    return drawn


def _error_bars(dot: Dot, x: Axis, y: Axis) -> str:
    """The lines over the intervals of a dot, as far as it has them."""
    drawn = ""
    if dot.low is not None and dot.high is not None:
        at_x = x.at(dot.x)
        top = y.at(dot.high)
        bottom = y.at(dot.low)
        drawn += svg.upright(at_x, top, bottom, dot.group)
    if dot.left is not None and dot.right is not None:
        at_y = y.at(dot.y)
        left = x.at(dot.left)
        right = x.at(dot.right)
        drawn += svg.level(left, right, at_y, dot.group)
    return drawn


def _labels(dots: Sequence[Dot], x: Axis, y: Axis) -> list[DotLabel]:
    """The names of dots for which there is a place: of those on the front first."""
    front_first = sorted(dots, key=lambda dot: not dot.front)
    places = []
    texts = []
    for dot in front_first:
        text = dot.label
        if len(text) > _LONGEST_DOT_LABEL:
            shown = _LONGEST_DOT_LABEL - 1
            text = text[:shown] + "…"
        at_x = x.at(dot.x)
        at_y = y.at(dot.y)
        places.append((at_x, at_y))
        texts.append(text)
    right = x.end + RIGHT
    bottom = HEIGHT - BOTTOM
    frame_box = Box(LEFT, TOP, right, bottom)
    return placed(places, texts, frame_box)
