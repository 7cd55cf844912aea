"""The curves of one configuration's seeds as their mean, and the band that they span."""

import math
from collections.abc import Sequence

from orchestrator.comparison.chart import BandPoint, Line, Point
from orchestrator.comparison.run import Curve


def mean_line(label: str, group: int, curves: Sequence[Curve]) -> Line:
    """The mean of curves at the steps that all of them have, and from the least to the greatest value there."""
    if len(curves) == 1:
        only = curves[0]
        return Line(label, group, only)
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            of_step = by_step.setdefault(step, [])
            of_step.append(value)
    count = len(curves)
    points: list[Point] = []
    band: list[BandPoint] = []
    for step in sorted(by_step):
        values = by_step[step]
        if len(values) < count:
            continue
        mean = math.fsum(values) / count
        point = (step, mean)
        points.append(point)
        if math.isfinite(mean):
            low = min(values)
            high = max(values)
            band.append((step, low, high))
    name = f"{label}, mean of {count} seeds"
    return Line(name, group, points, band)
