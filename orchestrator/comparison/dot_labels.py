"""Where the names of dots stand in a chart: each beside its dot, and none over another name or dot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.comparison.chart import Point

Anchor = Literal["start", "middle", "end"]
CHARACTER = 6.9  # pixels, at most on average in the fonts that pages ask for, at 12 pixels
_ASCENT, _DESCENT = 11, 4  # pixels above and below the line on which text stands
_RADIUS = 8  # of a dot, with its outline
_FROM_DOT = 10  # between a dot's middle and its name
_SHIFTS = (4, -9, 18, -22, 31)  # of the line on which a name stands, from the dot's middle: the nearest first
_AROUND = 2


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Whether two rectangles have a point in common."""
        left = max(self.left, other.left)
        right = min(self.right, other.right)
        if left > right:
            return False
        top = max(self.top, other.top)
        bottom = min(self.bottom, other.bottom)
        return top <= bottom

    def holds(self, other: "Box") -> bool:
        """Whether another rectangle lies within this one."""
        left = min(self.left, other.left)
        right = max(self.right, other.right)
        top = min(self.top, other.top)
        bottom = max(self.bottom, other.bottom)
        around = Box(left, top, right, bottom)
        return around == self


@dataclass(frozen=True)
class DotLabel:
    """A text with the place at which it starts, ends or has its middle."""

    text: str
    x: float
    y: float
    anchor: Anchor

    @property
    def box(self) -> Box:
        """What the text covers, or somewhat more."""
        count = len(self.text)
        width = CHARACTER * count
        left = self.x
        if self.anchor == "end":
            left -= width
        elif self.anchor == "middle":
            left -= width / 2
        right = left + width + _AROUND
        top = self.y - _ASCENT
        bottom = self.y + _DESCENT
        begin = left - _AROUND
        return Box(begin, top, right, bottom)


def placed(dots: Sequence[Point], texts: Sequence[str], frame: Box) -> list[DotLabel]:
    """The names of the first dots, within a frame; a name for which there is no place is left out.

    `texts` are those of as many dots from the first on, the most important ones first.
    """
    taken = []
    for x, y in dots:
        left = x - _RADIUS
        right = x + _RADIUS
        top = y - _RADIUS
        bottom = y + _RADIUS
        taken.append(Box(left, top, right, bottom))
    found: list[DotLabel] = []
    for (x, y), text in zip(dots, texts, strict=False):
        for label in _places(text, x, y):
            box = label.box
            if frame.holds(box) and not any(map(box.meets, taken)):
                found.append(label)
                taken.append(box)
                break
    return found


def _places(text: str, x: float, y: float) -> Iterator[DotLabel]:
    """The places that a dot's name may have, the best first."""
    for shift in _SHIFTS:
        base = y + shift
        yield DotLabel(text, x + _FROM_DOT, base, "start")
        yield DotLabel(text, x - _FROM_DOT, base, "end")
        if shift > _RADIUS:
            yield DotLabel(text, x, base + _DESCENT, "middle")
        elif shift < -_RADIUS:
            yield DotLabel(text, x, base - _DESCENT, "middle")
