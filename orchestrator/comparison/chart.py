"""Charts as inline SVG: lines over steps, and points of quality against cost with their Pareto front."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, WIDE, HEIGHT = 560, 1140, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
PALETTE = 10  # colours that the style sheet names --c0 to --c9
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5")
_MOST_POINTS = 400  # of a line

Points = Sequence[tuple[float, float]]
Bounds = tuple[float, float]  # the least and the most that a value can be
EVERYTHING: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Line:
    """One series; lines of one group share colour and dashes."""

    label: str
    group: int
    points: Points


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot. `front`: no other is better in both."""

    label: str
    group: int
    x: float
    y: float
    front: bool


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels; its ticks are round numbers of `unit` within `bounds`."""

    low: float
    high: float
    start: float
    end: float
    show: Callable[[float], str]
    unit: float = 1.0
    bounds: Bounds = EVERYTHING

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values within the scale, but for those that no value can have."""
        step = nice((self.high - self.low) / 5 / self.unit) * self.unit
        low, high = max(self.low, self.bounds[0]), min(self.high, self.bounds[1])
        first = math.ceil(low / step - 1e-9)
        return [(first + i) * step for i in range(12) if (first + i) * step <= high + 1e-9 * step]


def line_chart(
    title: str, lines: Sequence[Line], x_title: str, y_show: Callable[[float], str], bounds: Bounds, width: int
) -> str:
    """Lines over steps; a value that is not finite breaks its line, far outliers leave the frame."""
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not values:
        return ""
    x = _axis([x for line in lines for x, _ in line.points], LEFT, width - RIGHT, "{:g}".format)
    y = _axis(_without_outliers(values), HEIGHT - BOTTOM, TOP, y_show, bounds=bounds)
    drawn = "".join(_polyline(line, x, y) for line in lines)
    return _frame(title, x, y, x_title, f'<g clip-path="url(#plot)">{drawn}</g>')


def scatter(
    title: str,
    dots: Sequence[Dot],
    x_title: str,
    unit: float,
    shows: tuple[Callable[[float], str], ...],
    bounds: Bounds,
) -> str:
    """Points, those on the front filled and joined; labels where there is room."""
    x = replace(_axis([dot.x for dot in dots], LEFT, WIDTH - RIGHT, shows[0], margin=0.12), unit=unit)
    y = _axis([dot.y for dot in dots], HEIGHT - BOTTOM, TOP, shows[1], 0.12, bounds)
    front = sorted((dot.x, dot.y) for dot in dots if dot.front)
    joined = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in front)
    drawn = f'<polyline class="front" points="{joined}"/>' if len(front) > 1 else ""
    drawn += "".join(_dot(dot, x, y) for dot in dots)
    falling = front[0][1] > front[-1][1]
    named = [dot for dot in dots if dot.front or len(dots) <= 8] if len(front) <= 12 else []
    return _frame(title, x, y, x_title, drawn + "".join(_name(dot, x, y, falling) for dot in named))


def pareto(points: Points, more_is_better: bool) -> list[bool]:
    """For each (cost, quality): whether no other point is at least as good in both and better in one."""
    sign = 1 if more_is_better else -1
    costs = [(cost, -sign * quality) for cost, quality in points]
    return [not any(a <= c and b <= d and (a, b) != (c, d) for a, b in costs) for c, d in costs]


def nice(rough: float) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) that is next above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def colour(group: int) -> str:
    """The CSS colour of a group."""
    return f"var(--c{group % PALETTE})"


def swatch(group: int) -> str:
    """A short line in the style of a group, for legends."""
    return f'<svg class="swatch" width="26" height="8"><path d="M1 4H25" {_stroke(group)}/></svg>'


def thin(points: Points) -> list[tuple[float, float]]:
    """At most about 400 points that keep the extremes of each stretch, and every break."""
    stride = math.ceil(len(points) / (_MOST_POINTS / 2))
    if stride <= 2:
        return list(points)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stride):
        bucket = points[start : start + stride]
        broken = [point for point in bucket if not math.isfinite(point[1])][:1]
        finite = [point for point in bucket if math.isfinite(point[1])]
        ends = {min(finite, key=_second), max(finite, key=_second)} if finite else set()
        kept += sorted([*ends, *broken], key=lambda point: point[0])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _second(point: tuple[float, float]) -> float:
    return point[1]


def _axis(
    values: Sequence[float],
    start: float,
    end: float,
    show: Callable[[float], str],
    margin: float = 0.04,
    bounds: Bounds = EVERYTHING,
) -> Axis:
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end, show, bounds=bounds)


def _without_outliers(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    high = ordered[int(0.97 * (len(ordered) - 1))]
    limit = high + 2 * (high - ordered[0])
    return [value for value in ordered if value <= limit]


def _polyline(line: Line, x: Axis, y: Axis) -> str:
    pieces: list[list[str]] = [[]]
    for step, value in thin(line.points):
        if math.isfinite(value):
            pieces[-1].append(f"{x.at(step):.2f},{max(-1e5, y.at(value)):.2f}")
        elif pieces[-1]:
            pieces.append([])
    drawn = "".join(_piece(piece) for piece in pieces if piece)
    about = f'data-label="{escape(line.label)}" data-group="{line.group}"'
    return f'<g class="series" {about} {_stroke(line.group)}>{drawn}</g>'


def _piece(points: list[str]) -> str:
    if len(points) > 1:
        return f'<polyline points="{" ".join(points)}"/>'
    x, _, y = points[0].partition(",")
    return f'<circle cx="{x}" cy="{y}" r="2.5"/>'


def _dot(dot: Dot, x: Axis, y: Axis) -> str:
    fill = colour(dot.group) if dot.front else "var(--paper)"
    hint = escape(f"{dot.label}: {y.show(dot.y)} at {x.show(dot.x)}" + (", on the front" if dot.front else ""))
    return (
        f'<circle class="dot" data-group="{dot.group}" cx="{x.at(dot.x):.1f}" cy="{y.at(dot.y):.1f}" r="6" '
        f'fill="{fill}" stroke="{colour(dot.group)}"><title>{hint}</title></circle>'
    )


def _name(dot: Dot, x: Axis, y: Axis, falling: bool) -> str:
    """The label of a dot, on the side where the front does not pass."""
    right = x.at(dot.x) > (x.start + x.end) / 2
    at_y = y.at(dot.y) + (14 if right == falling else -7)
    text = escape(dot.label if len(dot.label) <= 30 else dot.label[:29] + "…")
    place = f'x="{x.at(dot.x) + (-9 if right else 9):.1f}" y="{at_y:.1f}" text-anchor="{"end" if right else "start"}"'
    return f'<text class="name" {place}>{text}</text>'


def _stroke(group: int) -> str:
    dash = _DASHES[group // PALETTE % len(_DASHES)]
    return f'fill="none" stroke="{colour(group)}" stroke-width="1.8"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _frame(title: str, x: Axis, y: Axis, x_title: str, drawn: str) -> str:
    rows = "".join(
        f'<path class="grid" d="M{LEFT} {y.at(v):.1f}H{x.end}"/>'
        f'<text x="{LEFT - 8}" y="{y.at(v) + 4:.1f}" text-anchor="end">{escape(y.show(v))}</text>'
        for v in y.ticks()
    )
    columns = "".join(
        f'<text x="{x.at(v):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(x.show(v))}</text>'
        for v in x.ticks()
    )
    base = f'<path class="base" d="M{LEFT} {HEIGHT - BOTTOM}H{x.end}"/>'
    caption = f'<text x="{(x.start + x.end) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
    scale = f'data-x="{x.low} {x.high} {x.start} {x.end}" data-y="{y.low} {y.high} {y.start} {y.end}"'
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {x.end + RIGHT:g} {HEIGHT}" {scale}>{rows}{columns}{base}{caption}{drawn}</svg></figure>'
    )
