"""Intervals of what one evaluation measured on rows, and of differences on the same rows.

`intervals.py` has those of several seeds.

Shares: Wilson 1927. Differences of shares on the same rows: Bonett and Price 2012, who add a row to each of the two
kinds on which both disagree, so that a few rows never seem to say all. Means per token and their differences: ratios
of sums, linearised, with Student's t. Not bootstraps: on few rows their intervals are too short.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from orchestrator.comparison.intervals import CONFIDENCE
from orchestrator.comparison.student import critical_value

FlagsByRow = Sequence[bool]
NumbersByRow = Sequence[float]
_TIE = 0.5


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of zero."""
        is_above = self.low > 0
        return is_above or self.high < 0

    def to_json(self) -> dict[str, float | None]:
        """The estimate as plain data; an end that is not finite is null."""
        return {
            "value": _finite_or_null(self.value),
            "low": _finite_or_null(self.low),
            "high": _finite_or_null(self.high),
        }


def share(right: FlagsByRow, level: float = CONFIDENCE) -> Estimate:
    """The share of rows that are right, by Wilson's interval."""
    n = len(right)
    p = sum(right) / n
    z = _normal_quantile(level)
    weight = z * z / n
    scale = 1 + weight
    centre = p + weight / 2
    centre /= scale
    variance = p * (1 - p)
    variance += weight / 4
    half = z * math.sqrt(variance / n)
    half /= scale
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return Estimate(p, low, high)


def difference_of_shares(a: FlagsByRow, b: FlagsByRow, level: float = CONFIDENCE) -> Estimate:
    """The share that is right of `a` less that of `b`, on the same rows."""
    n = len(a)
    only_a = 0
    only_b = 0
    for in_a, in_b in zip(a, b, strict=True):
        only_a += in_a > in_b
        only_b += in_b > in_a
    rows = n + 2
    share_a = (only_a + 1) / rows
    share_b = (only_b + 1) / rows
    centre = share_a - share_b
    disagreeing = share_a + share_b
    variance = disagreeing - centre**2
    half = _normal_quantile(level) * math.sqrt(variance / rows)
    low = max(-1.0, centre - half)
    high = min(1.0, centre + half)
    return Estimate((only_a - only_b) / n, low, high)


def win_rate(wins: NumbersByRow, level: float = CONFIDENCE) -> Estimate:
    """The mean of 1 for a row that is won, 0 for one that is lost and one half for a tie.

    It is one half, and half of what the share won is more than the share lost.
    """
    won = [value > _TIE for value in wins]
    lost = [value < _TIE for value in wins]
    more = difference_of_shares(won, lost, level)
    value = _share_won(more.value)
    low = _share_won(more.low)
    high = _share_won(more.high)
    return Estimate(value, low, high)


def _share_won(more: float) -> float:
    """The win rate where the share of rows won is by `more` above the share lost."""
    return _TIE + more / 2


def ratio_of_sums(sums: NumbersByRow, weights: NumbersByRow, level: float = CONFIDENCE) -> Estimate:
    """The sum over rows by the weight of all rows, as a loss per token; of a single row there is no interval."""
    total = math.fsum(weights)
    if not total:
        return Estimate(math.nan, math.nan, math.nan)
    value = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return Estimate(value, -math.inf, math.inf)
    squares = []
    for of_row, weight in zip(sums, weights, strict=True):
        residual = of_row - value * weight
        squares.append(residual**2)
    variance = math.fsum(squares) * n / (n - 1)
    deviation = math.sqrt(variance) / total
    half = critical_value(level, n - 1) * deviation
    return Estimate(value, value - half, value + half)


def difference_of_ratios(
    a: NumbersByRow, b: NumbersByRow, weights: NumbersByRow, level: float = CONFIDENCE
) -> Estimate:
    """The ratio of `a` less that of `b`, on the same rows with the same weights."""
    differences = []
    for of_a, of_b in zip(a, b, strict=True):
        differences.append(of_a - of_b)
    return ratio_of_sums(differences, weights, level)


def _normal_quantile(level: float) -> float:
    """How many standard deviations a two-sided interval of a level reaches."""
    middle = (1 + level) / 2
    return NormalDist().inv_cdf(middle)


def _finite_or_null(value: float) -> float | None:
    """A value that JSON can hold."""
    if math.isfinite(value):
        return value
    return None
