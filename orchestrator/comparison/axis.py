"""The axes of charts: scales from values to pixels, linear or logarithmic, and their ticks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HALF_WIDTH, FULL_WIDTH, HEIGHT = 560, 1140, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
_MOST_TICKS = 12
_AXIS_MARGIN = 0.04  # of the range of values, on each side
_DECADE = 10.0  # from the least to the greatest value, from which on a scale is logarithmic
_MARKS = (1.0, 2.0, 5.0)  # what a power of ten is multiplied with for ticks, where there are few
_FEW_DECADES = 3

Values = Sequence[float]
Bounds = tuple[float, float]  # the least and the most that a value can be
FormatValue = Callable[[float], str]  # a value as text
EVERYTHING: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels; its ticks are round numbers of `unit` within `bounds`."""

    low: float
    high: float
    start: float
    end: float
    show: FormatValue
    unit: float = 1.0
    bounds: Bounds = EVERYTHING

    @property
    def middle(self) -> float:
        """The pixel between start and end."""
        both_ends = self.start + self.end
        return both_ends / 2

    @property
    def scale(self) -> str:
        """Both values and their pixels, for the report's script."""
        values = f"{self.low} {self.high}"
        pixels = f"{self.start} {self.end}"
        return f"{values} {pixels}"

    def at(self, value: float) -> float:
        """The pixel at which a value lies."""
        pixels = self.end - self.start
        values = self.high - self.low
        above_low = value - self.low
        fraction = above_low / values
        return self.start + fraction * pixels

    def ticks(self) -> list[float]:
        """Four to eight round values within the scale, but for those that no value can have."""
        fifth = (self.high - self.low) / 5
        units = nice(fifth / self.unit)
        step = units * self.unit
        least, most = self.bounds
        low = max(self.low, least)
        high = min(self.high, most)
        tolerance = 1e-9 * step
        limit = high + tolerance
        first = math.ceil(low / step - 1e-9)
        ticks = []
        for multiple in range(first, first + _MOST_TICKS):
            value = multiple * step
            if value <= limit:
                ticks.append(value)
        return ticks


class LogAxis(Axis):
    """A logarithmic scale from values above zero to pixels; `low` and `high` are logarithms to base ten."""

    @property
    def scale(self) -> str:
        """As that of a linear one, of the logarithms, and a word that says so."""
        return f"{super().scale} log"

    def at(self, value: float) -> float:
        """The pixel at which a value lies."""
        logarithm = math.log10(value)
        return super().at(logarithm)

    def ticks(self) -> list[float]:
        """Powers of ten within the scale, where it has few of them also twice and five times those."""
        marks: Values = _MARKS
        if self.high - self.low > _FEW_DECADES:
            marks = _MARKS[:1]
        ticks = []
        first = math.floor(self.low)
        last = math.ceil(self.high)
        for exponent in range(first, last):
            for mark in marks:
                value = mark * 10.0**exponent
                if self.low <= math.log10(value) <= self.high:
                    ticks.append(value)
        return ticks


def spans_decades(values: Values) -> bool:
    """Whether values are all above zero, and the greatest is many times the least."""
    low = min(values)
    high = max(values)
    return low > 0 and high >= _DECADE * low


def log_y_axis(values: Values, show: FormatValue) -> Axis:
    """The logarithmic scale from bottom to top that holds all values."""
    logarithms = list(map(math.log10, values))
    low, high = _limits(logarithms, _AXIS_MARGIN)
    start = HEIGHT - BOTTOM
    end = TOP
    return LogAxis(low, high, start, end, show)


def nice(rough: float) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) that is next above."""
    exponent = math.floor(math.log10(rough))
    power = 10.0**exponent
    least = rough * (1 - 1e-9)
    for factor in (1, 2, 2.5, 5):
        if factor * power >= least:
            return factor * power
    return 10 * power


def x_axis(values: Values, width: int, show: FormatValue, margin: float = _AXIS_MARGIN) -> Axis:
    """The scale from left to right that holds all values, in a chart of a width."""
    low, high = _limits(values, margin)
    start = LEFT
    end = width - RIGHT
    return Axis(low, high, start, end, show)


def y_axis(values: Values, show: FormatValue, bounds: Bounds, margin: float = _AXIS_MARGIN) -> Axis:
    """The scale from bottom to top that holds all values."""
    low, high = _limits(values, margin)
    start = HEIGHT - BOTTOM
    end = TOP
    return Axis(low, high, start, end, show, bounds=bounds)


def _limits(values: Values, margin: float) -> Bounds:
    """The least and the greatest value, with some space around them."""
    low = min(values)
    high = max(values)
    space = margin * (high - low)
    if not space:
        space = 0.1 * abs(high) or 1.0
    return low - space, high + space
