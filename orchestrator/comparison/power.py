"""What so many seeds and rows can show: power, the smallest difference, and how many of them a difference needs.

Shape suffixes are those of intervals.py.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import numpy as np

from orchestrator.comparison.intervals import CONFIDENCE
from orchestrator.comparison.student import critical_values
from orchestrator.comparison.variances import MeanSquares, SeedRows, Spread

PowerOf = Callable[[int], float]  # from a number of seeds or rows
POWER = 0.8
MOST_SEEDS = 1000  # that anybody is told to run
MOST_ROWS_SAID = 10_000_000
_DRAWS = 1000
_HALVINGS = 30
_normal = NormalDist()


def power(spread: Spread, difference: float, seeds: int, rows: int, level: float = CONFIDENCE) -> float:
    """How often so many seeds and rows (two or more of each) tell a difference from none.

    The width of the interval is as uncertain as its mean squares: averaged over draws of these, always the same.
    """
    error = math.sqrt(spread.variance(seeds, rows))
    if error == 0:
        return 1.0 if difference else 0.0
    squares = _drawn_squares(spread, seeds, rows)
    pairs = seeds * rows
    variances = squares.sum_of_parts / pairs
    errors = np.sqrt(variances)
    critical = critical_values(level, squares.degrees)
    half_widths = critical * errors
    found = 0.0
    for half in half_widths:
        above = (difference - half) / error
        below = (-difference - half) / error
        found += _normal.cdf(above) + _normal.cdf(below)
    return float(found / _DRAWS)


def smallest_difference(spread: Spread, seeds: int, rows: int, level: float = CONFIDENCE) -> float:
    """The smallest difference that so many seeds and rows tell from none in 80 of 100 cases."""
    variance = spread.variance(seeds, rows)
    if variance == 0:
        return 0.0
    low = 0.0
    high = math.sqrt(variance)
    while power(spread, high, seeds, rows, level) < POWER:
        low = high
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = power(spread, middle, seeds, rows, level)
        if found < POWER:
            low = middle
        else:
            high = middle
    return high


def seeds_needed(spread: Spread, difference: float, rows: int, level: float = CONFIDENCE) -> int | None:
    """The seeds with which so many rows show a difference in 80 of 100 cases; None where no number of them does."""

    power_of = partial(power, spread, difference, rows=rows, level=level)
    return _fewest(MOST_SEEDS, power_of)


def rows_needed(spread: Spread, difference: float, seeds: int, level: float = CONFIDENCE) -> int | None:
    """The rows with which so many seeds show a difference in 80 of 100 cases; None where no number of them does."""

    power_of = partial(power, spread, difference, seeds, level=level)
    return _fewest(MOST_ROWS_SAID, power_of)


def _fewest(most: int, power_of: PowerOf) -> int | None:
    """The smallest number, of two and more, whose power is enough: it rises with the number."""
    if power_of(most) < POWER:
        return None
    low = 1
    high = most
    while high - low > 1:
        middle = (low + high) // 2
        found = power_of(middle)
        if found < POWER:
            low = middle
        else:
            high = middle
    return high


def _drawn_squares(spread: Spread, seeds: int, rows: int) -> MeanSquares:
    """Draws of the mean squares that so many seeds and rows may give, as arrays."""
    rng = np.random.default_rng(0)
    free_seeds = seeds - 1
    free_rows = rows - 1
    expected_of_seeds = rows * spread.seeds + spread.rest
    expected_of_rows = seeds * spread.rows + spread.rest
    noise = _mean_squares_of_noise(rng, free_seeds * free_rows)
    rest = spread.rest * noise
    noise = _mean_squares_of_noise(rng, free_seeds)
    of_seeds = expected_of_seeds * noise
    noise = _mean_squares_of_noise(rng, free_rows)
    of_rows = expected_of_rows * noise
    return MeanSquares(of_seeds, of_rows, rest, seeds, rows)


def _mean_squares_of_noise(rng: np.random.Generator, degrees: int) -> SeedRows:
    """Draws of a mean of squares with so many degrees of freedom, of noise with a variance of one."""
    sums = rng.chisquare(degrees, size=_DRAWS)
    return sums / degrees
