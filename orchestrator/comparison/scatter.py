"""Points of quality against cost as inline SVG, with their Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.comparison import svg
from orchestrator.comparison.chart import HALF_WIDTH, Axis, Bounds, FormatValue, Point, Points, frame, x_axis, y_axis

_SCATTER_MARGIN = 0.12  # of the range of values, on each side
# More dots than these get no labels, or those on the front alone: there is no space for them.
_MOST_LABELLED_ON_FRONT = 12
_MOST_LABELLED = 8
_LONGEST_DOT_LABEL = 30  # characters


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot. `front`: no other is better in both."""

    label: str
    group: int
    x: float
    y: float
    front: bool


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
    x = x_axis(costs, HALF_WIDTH, x_show, _SCATTER_MARGIN)
    x = replace(x, unit=unit)
    y = y_axis(qualities, y_show, bounds, _SCATTER_MARGIN)
    front = _front(dots)
    drawn = _joined(front, x, y)
    for dot in dots:
        drawn += _dot(dot, x, y)
    _, first_quality = front[0]
    _, last_quality = front[-1]
    is_falling = first_quality > last_quality
    for dot in _labelled(dots):
        drawn += _label(dot, x, y, is_falling)
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
    return svg.dot(at_x, at_y, dot.group, dot.front, hint)


def _labelled(dots: Sequence[Dot]) -> Sequence[Dot]:
    """The dots that there is space to label: all, those on the front, or none."""
    front = []
    for dot in dots:
        if dot.front:
            front.append(dot)
    if len(front) > _MOST_LABELLED_ON_FRONT:
        return []
    if len(dots) <= _MOST_LABELLED:
        return dots
    return front


def _label(dot: Dot, x: Axis, y: Axis, is_falling: bool) -> str:
    """The label of a dot, on the side where the front does not pass."""
    text = dot.label
    if len(text) > _LONGEST_DOT_LABEL:
        shown = _LONGEST_DOT_LABEL - 1
        text = text[:shown] + "…"
    at_x = x.at(dot.x)
    at_y = y.at(dot.y)
    is_right = at_x > x.middle
    is_below = is_right == is_falling
    if is_below:
        at_y += 14
    else:
        at_y -= 7
    if is_right:
        return svg.name(at_x - 9, at_y, "end", text)
    return svg.name(at_x + 9, at_y, "start", text)
