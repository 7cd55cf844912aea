"""The elements of a chart as SVG text. Coordinates are pixels; `group` chooses colour and dashes."""

from html import escape

PALETTE = 10  # colours that the style sheet names --c0 to --c9
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5")

_SWATCH = '<svg class="swatch" width="26" height="8"><path d="M1 4H25" {stroke}/></svg>'
# The report's script reads label and group.
_SERIES = '<g class="series" data-label="{label}" data-group="{group}" {stroke}>{drawn}</g>'
_POLYLINE = '<polyline points="{points}"/>'
_BAND_AREA = '<polygon class="band" data-group="{group}" points="{points}" fill="{colour}"/>'
_FRONT = '<polyline class="front" points="{points}"/>'
_SINGLE = '<circle cx="{x}" cy="{y}" r="2.5"/>'
_DOT = (
    '<circle class="dot" data-group="{group}" cx="{x:.1f}" cy="{y:.1f}" r="6" '
    'fill="{fill}" stroke="{colour}"><title>{hint}</title></circle>'
)
_UPRIGHT_LINE = '<path class="error" data-group="{group}" d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}"/>'
_LEVEL_LINE = '<path class="error" data-group="{group}" d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{colour}"/>'
_HORIZONTAL = '<path class="{kind}" d="M{left} {y}H{right}"/>'
_TEXT = '<text x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'
_NAME = '<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def colour(group: int) -> str:
    """The CSS colour of a group."""
    return f"var(--c{group % PALETTE})"


def _stroke(group: int) -> str:
    """The attributes that give a line the colour and dashes of a group."""
    attributes = f'fill="none" stroke="{colour(group)}" stroke-width="1.8"'
    times_through_colours = group // PALETTE
    dash = _DASHES[times_through_colours % len(_DASHES)]
    if not dash:
        return attributes
    return f'{attributes} stroke-dasharray="{dash}"'


def swatch(group: int) -> str:
    """A short line in the style of a group, for legends."""
    stroke = _stroke(group)
    return _SWATCH.format(stroke=stroke)


def series(label: str, group: int, drawn: str) -> str:
    """All that is drawn of one line."""
    label = escape(label)
    stroke = _stroke(group)
    return _SERIES.format(label=label, group=group, stroke=stroke, drawn=drawn)


def polyline(points: list[str]) -> str:
    """An unbroken segment of a line through points "x,y", of which there may be one alone."""
    if len(points) > 1:
        joined = " ".join(points)
        return _POLYLINE.format(points=joined)
    x, _, y = points[0].partition(",")
    return _SINGLE.format(x=x, y=y)


def band(points: list[str], group: int) -> str:
    """The area within an outline of points "x,y", in the colour of a group."""
    joined = " ".join(points)
    of_group = colour(group)
    return _BAND_AREA.format(group=group, points=joined, colour=of_group)


def front(points: list[str]) -> str:
    """The line through the points "x,y" of a Pareto front."""
    joined = " ".join(points)
    return _FRONT.format(points=joined)


def dot(x: float, y: float, group: int, filled: bool, hint: str) -> str:
    """A point of a scatter plot; the hint is shown where the mouse rests on it."""
    outline = colour(group)
    fill = "var(--paper)"
    if filled:
        fill = outline
    fields = {"group": group, "x": x, "y": y, "fill": fill, "colour": outline}
    escaped = escape(hint)
    return _DOT.format(hint=escaped, **fields)


def upright(x: float, top: float, bottom: float, group: int) -> str:
    """An upright line in the colour of a group: an interval."""
    fields = {"x": x, "top": top, "bottom": bottom}
    of_group = colour(group)
    return _UPRIGHT_LINE.format(group=group, colour=of_group, **fields)


def level(left: float, right: float, y: float, group: int) -> str:
    """A level line in the colour of a group: an interval."""
    fields = {"left": left, "right": right, "y": y}
    of_group = colour(group)
    return _LEVEL_LINE.format(group=group, colour=of_group, **fields)


def horizontal(kind: str, left: int, right: float, y: str) -> str:
    """A horizontal line of a kind that the style sheet knows; y as it is written."""
    ends = {"left": left, "right": right}
    look = {"kind": kind, "y": y}
    return _HORIZONTAL.format(**look, **ends)


def text(x: str, y: str, anchor: str, content: str) -> str:
    """A text that starts, ends or has its middle at a place; x and y as they are written."""
    escaped = escape(content)
    fields = {"x": x, "y": y, "anchor": anchor, "content": escaped}
    return _TEXT.format_map(fields)


def name(x: float, y: float, anchor: str, content: str) -> str:
    """The name of a dot, which stays readable over what is drawn there."""
    escaped = escape(content)
    fields = {"x": x, "y": y, "anchor": anchor, "content": escaped}
    return _NAME.format_map(fields)
