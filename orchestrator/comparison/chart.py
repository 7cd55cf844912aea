"""Charts as inline SVG: their frame, and lines over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter

from orchestrator.comparison import svg
from orchestrator.comparison.axis import (
    BOTTOM,
    EVERYTHING,
    HEIGHT,
    LEFT,
    RIGHT,
    Axis,
    Bounds,
    FormatValue,
    Values,
    log_y_axis,
    spans_decades,
    x_axis,
    y_axis,
)

_MOST_POINTS, _FEWEST_POINTS = 400, 24  # of a line
_POINTS_OF_CHART = 40_000  # which its lines share, so that a page of a thousand runs is no burden

_DIGIT_WIDTH = 7.5  # pixels of a character in a tick's text, at most

_FIGURE = (
    '<figure><figcaption>{title}</figcaption><svg class="chart" role="img" aria-label="{title}" '
    'viewBox="0 0 {width:g} {height}" data-of="{of}" data-x="{x}" data-y="{y}">{content}</svg></figure>'
)

Point = tuple[float, float]
Points = Sequence[Point]
BandPoint = tuple[float, float, float]  # where, and from which value to which
_POINT_STEP = itemgetter(0)  # of a point of a line
_POINT_VALUE = itemgetter(1)


@dataclass(frozen=True)
class Line:
    """One series; lines of one group share colour and dashes. `band` is what lies around it."""

    label: str
    group: int
    points: Points
    band: Sequence[BandPoint] = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    y_show: FormatValue,
    bounds: Bounds,
    width: int,
    x_show: FormatValue = "{:g}".format,
    marked: bool = False,
) -> str:
    """Lines over steps; a value that is not finite breaks its line, far outliers leave the frame.

    `marked`: each point of a line has a mark, and none leaves the frame.
    """
    steps = []
    values = []
    for line in lines:
        for step, value in line.points:
            steps.append(step)
            if math.isfinite(value):
                values.append(value)
        for _, low, high in line.band:
            values += [low, high]
    if not values:
        return ""
    x = x_axis(steps, width, x_show)
    y = _y_axis_of(values, y_show, bounds, marked)
    drawn = ""
    share = _POINTS_OF_CHART // len(lines)
    most = min(_MOST_POINTS, max(_FEWEST_POINTS, share))
    for line in lines:
        drawn += _band(line, x, y, most)
    for line in lines:
        drawn += _series(line, x, y, marked, most)
    clipped = f'<g clip-path="url(#plot)">{drawn}</g>'
    return frame(title, x, y, x_title, clipped)


def thin(points: Points, most: int = _MOST_POINTS) -> list[Point]:
    """At most about so many points that keep the extremes of each stretch, and every break."""
    stretches = most / 2
    stride = math.ceil(len(points) / stretches)
    if stride <= 2:
        return list(points)
    kept: list[Point] = []
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        kept += _extremes(stretch)
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _extremes(stretch: Points) -> list[Point]:
    """The lowest and the highest point of a stretch, and the first that is not finite, in the order of steps."""
    finite: list[Point] = []
    broken: list[Point] = []
    for point in stretch:
        _, value = point
        kind = finite if math.isfinite(value) else broken
        kind.append(point)
    kept = broken[:1]
    if finite:
        lowest = min(finite, key=_POINT_VALUE)
        highest = max(finite, key=_POINT_VALUE)
        kept = [*{lowest, highest}, *kept]
    return sorted(kept, key=_POINT_STEP)


def _y_axis_of(values: Values, show: FormatValue, bounds: Bounds, marked: bool) -> Axis:
    """The scale of values: logarithmic where they span decades and have no bounds, else linear."""
    if marked:
        return y_axis(values, show, bounds)
    inliers = _without_outliers(values)
    if bounds == EVERYTHING and spans_decades(inliers):
        return log_y_axis(inliers, show)
    return y_axis(inliers, show, bounds)


def _without_outliers(values: Values) -> list[float]:
    """The values in order, less those far above 97 in 100 of them; of few values all."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low = ordered[0]
    high = ordered[math.ceil(0.97 * last)]
    limit = high + 2 * (high - low)
    return [value for value in ordered if value <= limit]


def _band(line: Line, x: Axis, y: Axis, most: int) -> str:
    """What lies around a line, from its lowest to its highest values; empty where there is nothing."""
    if len(line.band) < 2:
        return ""
    lows: list[Point] = []
    highs: list[Point] = []
    for step, low, high in line.band:
        lows.append((step, low))
        highs.append((step, high))
    lower = thin(lows, most)
    lower.reverse()
    upper = thin(highs, most)
    outline = []
    for step, value in upper + lower:
        at_x = x.at(step)
        at_y = max(-1e5, y.at(value))
        outline.append(f"{at_x:.1f},{at_y:.1f}")
    return svg.band(outline, line.group)


def _series(line: Line, x: Axis, y: Axis, marked: bool, most: int) -> str:
    """A line, as segments between its breaks."""
    segments: list[list[str]] = [[]]
    for step, value in thin(line.points, most):
        if math.isfinite(value):
            at_x = x.at(step)
            at_y = max(-1e5, y.at(value))
            point = f"{at_x:.2f},{at_y:.2f}"
            segments[-1].append(point)
        elif segments[-1]:
            segments.append([])
    drawn = ""
    for segment in segments:
        if segment:
            drawn += svg.polyline(segment)
        if not marked:
            continue
        for point in segment:
            drawn += svg.polyline([point])
    return svg.series(line.label, line.group, drawn)


def frame(title: str, x: Axis, y: Axis, x_title: str, drawn: str) -> str:
    """A chart with its axes; the report's script finds values by the scales that the element holds."""
    content = _y_ticks(y, x.end)
    content += f'<g class="across">{_x_ticks(x)}</g>'
    content += _x_axis_line(x, x_title)
    content += drawn
    scales = {"x": x.scale, "y": y.scale}
    size = {"width": x.end + RIGHT, "height": HEIGHT}
    title = escape(title)
    of = escape(x_title)
    return _FIGURE.format(title=title, of=of, content=content, **size, **scales)


def _x_axis_line(x: Axis, title: str) -> str:
    """The horizontal axis and its title."""
    bottom = str(HEIGHT - BOTTOM)
    line = svg.horizontal("base", LEFT, x.end, bottom)
    title_x = str(x.middle)
    title_y = str(HEIGHT - 6)
    text = svg.text(title_x, title_y, "middle", title)
    return f'{line}<g class="across-title">{text}</g>'


def _y_ticks(y: Axis, right: float) -> str:
    """A line and a text for each tick of the vertical axis."""
    rows = ""
    text_x = str(LEFT - 8)
    for value in y.ticks():
        pixel = y.at(value)
        text_y = f"{pixel + 4:.1f}"
        line_y = f"{pixel:.1f}"
        rows += svg.horizontal("grid", LEFT, right, line_y)
        text = y.show(value)
        rows += svg.text(text_x, text_y, "end", text)
    return rows


def _x_ticks(x: Axis) -> str:
    """A text for each tick of the horizontal axis; one that would reach beyond the chart ends at its edge."""
    columns = ""
    text_y = str(HEIGHT - BOTTOM + 18)
    edge = x.end + RIGHT
    for value in x.ticks():
        text = x.show(value)
        middle = x.at(value)
        half = len(text) * _DIGIT_WIDTH / 2
        if middle + half > edge:
            columns += svg.text(f"{edge:.1f}", text_y, "end", text)
        else:
            columns += svg.text(f"{middle:.1f}", text_y, "middle", text)
    return columns
