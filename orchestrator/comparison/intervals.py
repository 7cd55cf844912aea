"""Differences of two configurations that were run with several seeds and judged on the same rows, with intervals.

Both seeds and rows are samples: another seed trains another model, and other rows could have been asked. A value of
seed s and row n is mean + seed effect + row effect + rest; the mean over S seeds and N rows has the variance
seeds / S + rows / N + rest / (S N). Mean squares estimate these parts (crossed random effects), and Satterthwaite
1946 gives the degrees of freedom for Student's t. The estimated variance is never less than what seeds alone, or rows
alone, show. A bootstrap over few seeds would be too short by far: at 5 seeds nominal 95 % cover 83 %.

Shape suffixes: S seeds, N rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from orchestrator.comparison.student import critical_value
from orchestrator.comparison.variances import MeanSquares, SeedRows, Spread, VariancePart

Scope = Literal["seeds and rows", "rows", "seeds"]  # what the interval of a contrast speaks for
CONFIDENCE = 0.95
_ADDED_ROWS = 2  # by Bonett and Price: one on which the first alone is right, and one of the second


@dataclass(frozen=True)
class Contrast:
    """A mean, its standard error and the degrees of freedom of that; `scope` is what its interval speaks for."""

    value: float
    error: float
    degrees: float
    seeds: int
    rows: int
    scope: Scope
    spread: Spread | None = None

    def half_width(self, level: float = CONFIDENCE) -> float:
        """How far the interval of a level reaches to each side; without end where one value is all there is."""
        if not math.isfinite(self.error):
            return math.inf
        critical = critical_value(level, self.degrees)
        return critical * self.error

    def interval(self, level: float = CONFIDENCE) -> tuple[float, float]:
        """Both ends of the interval of a level."""
        half = self.half_width(level)
        low = self.value - half
        high = self.value + half
        return low, high


def contrast(values_SN: SeedRows) -> Contrast:
    """The mean of values by seed and row, of one configuration or differences of two, where there are several."""
    seeds, rows = values_SN.shape
    if rows == 1:
        return contrast_of_seeds(values_SN[:, 0])
    if seeds == 1:
        return _contrast_of_rows(values_SN[0])
    squares = MeanSquares.of(values_SN)
    value = float(values_SN.mean())
    pairs = seeds * rows
    part = VariancePart(squares.sum_of_parts / pairs, squares.degrees)
    spread = squares.spread
    least = _least_variance(values_SN)
    if part.variance < least:
        between_rows = spread.rows + rows * (least - part.variance)
        spread = replace(spread, rows=between_rows)
        part = part.raised(least, rows - 1)
    error = math.sqrt(part.variance)
    return Contrast(value, error, part.degrees, seeds, rows, "seeds and rows", spread)


def _least_variance(values_SN: SeedRows) -> float:
    """The least variance of the mean of values that are -1, 0 or 1: what Bonett and Price have where all are 0.

    Rows on which nobody disagrees are no proof that there are no others.
    """
    if not _are_signs(values_SN):
        return 0.0
    rows: int = values_SN.shape[1] + _ADDED_ROWS
    return _ADDED_ROWS / rows**2


def _are_signs(values: SeedRows) -> bool:
    """Whether all values are -1, 0 or 1, as of rows that are right or wrong."""
    are_signs = np.isin(values, (-1.0, 0.0, 1.0))
    return bool(are_signs.all())


def contrast_of_seeds(values_S: SeedRows) -> Contrast:
    """The mean of one value for each seed; of a single one, or of equal ones, nothing is known about others."""
    seeds = len(values_S)
    value = float(values_S.mean())
    if _are_alike(values_S):
        return Contrast(value, math.inf, 1.0, seeds, 1, "seeds")
    part = _part_of_mean(values_S)
    error = math.sqrt(part.variance)
    return Contrast(value, error, part.degrees, seeds, 1, "seeds")


def contrast_unpaired(first_SN: SeedRows, second_SN: SeedRows) -> Contrast:
    """The difference of two configurations on the same rows whose seeds differ, first less second."""
    seeds = min(len(first_SN), len(second_SN))
    rows = first_SN.shape[1]
    if rows == 1:
        return _welch(first_SN[:, 0], second_SN[:, 0])
    first_N = first_SN.mean(axis=0)
    second_N = second_SN.mean(axis=0)
    differences_N = first_N - second_N
    between_rows = _contrast_of_rows(differences_N)
    if seeds == 1:
        return between_rows
    variance = between_rows.error**2
    part = VariancePart(variance, between_rows.degrees)
    parts = [part]
    excess = 0.0
    for values_SN in (first_SN, second_SN):
        squares = MeanSquares.of(values_SN)
        pairs = values_SN.size
        part = VariancePart(squares.of_seeds / pairs, squares.seeds - 1)
        parts.append(part)
        excess += squares.rest / pairs  # which rows and seeds both have
    value = float(differences_N.mean())
    return _summed(value, parts, excess, seeds, rows, "seeds and rows")


def ratio_values(sums_SN: SeedRows, weights_N: SeedRows) -> SeedRows:
    """SeedRows by row whose mean is, for each seed, the ratio of sums to weights: as a loss by labels, linearised.

    With them the interval of a ratio is that of a mean. For differences give differences of the sums.
    """
    weight = weights_N.mean()
    means_S = sums_SN.mean(axis=1, keepdims=True)
    ratios_S = means_S / weight
    residuals_SN = sums_SN - ratios_S * weights_N
    scaled_SN = residuals_SN / weight
    values_SN: SeedRows = ratios_S + scaled_SN
    return values_SN


def at_once(comparisons: int, level: float = CONFIDENCE) -> float:
    """The level of each of some intervals that shall hold all at once, by Bonferroni."""
    error = 1 - level
    return 1 - error / max(1, comparisons)


def _contrast_of_rows(values_N: SeedRows) -> Contrast:
    """The mean of one value for each row, with one seed.

    Of values that are -1, 0 or 1, Bonett and Price 2012: a row is added to each of the two kinds on which both
    disagree, so that a few rows never seem to say all.
    """
    rows = len(values_N)
    value = float(values_N.mean())
    if _are_signs(values_N):
        values_N = np.concatenate([values_N, [1.0, -1.0]])
    part = _part_of_mean(values_N)
    error = math.sqrt(part.variance)
    return Contrast(value, error, rows - 1, 1, rows, "rows")


def _welch(first_S: SeedRows, second_S: SeedRows) -> Contrast:
    """The difference of two means over seeds, whose spreads may differ."""
    difference = first_S.mean() - second_S.mean()
    value = float(difference)
    seeds = min(len(first_S), len(second_S))
    if seeds == 1 or (_are_alike(first_S) and _are_alike(second_S)):
        return Contrast(value, math.inf, 1.0, seeds, 1, "seeds")
    first = _part_of_mean(first_S)
    second = _part_of_mean(second_S)
    parts = [first, second]
    return _summed(value, parts, 0.0, seeds, 1, "seeds")


def _are_alike(values_S: SeedRows) -> bool:
    """Whether values show no spread: there is one of them, or they are equal but for rounding."""
    mean = values_S.mean()
    return bool(np.allclose(values_S, mean, rtol=1e-12, atol=0.0))


def _part_of_mean(values: SeedRows) -> VariancePart:
    """The variance of the mean of some values."""
    count = len(values)
    variance = float(values.var(ddof=1))
    return VariancePart(variance / count, count - 1)


def _summed(
    value: float, parts: Sequence[VariancePart], excess: float, seeds: int, rows: int, scope: Scope
) -> Contrast:
    """A contrast whose variance is a sum of parts, less what several of them have in common, and no less than one."""
    largest = 0.0
    variance = -excess
    below = 0.0
    for part in parts:
        largest = max(largest, part.variance)
        variance += part.variance
        square = part.variance**2
        below += square / part.degrees
    variance = max(variance, largest)
    degrees = 1.0
    if below:
        of_sum = variance**2 / below
        degrees = max(degrees, of_sum)
    error = math.sqrt(variance)
    return Contrast(value, error, degrees, seeds, rows, scope)
