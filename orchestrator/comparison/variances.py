"""The variance of a mean over seeds and rows, by its parts, and what mean squares say of them (see intervals.py).

Shape suffixes: S seeds, N rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SeedRows = npt.NDArray[np.float64]
NumberOrDraws = Any
_TINY = 1e-300


@dataclass(frozen=True)
class Spread:
    """The variances of a difference between seeds and between rows, and of the rest."""

    seeds: float
    rows: float
    rest: float

    def variance(self, seeds: int, rows: int) -> float:
        """That of the mean over so many seeds and rows."""
        of_seeds = self.seeds / seeds
        of_rows = self.rows / rows
        pairs = seeds * rows
        of_rest = self.rest / pairs
        return of_seeds + of_rows + of_rest


@dataclass(frozen=True)
class VariancePart:
    """A part of the variance of a difference, and the degrees of freedom with which it is known."""

    variance: float
    degrees: float

    def raised(self, least: float, most_degrees: float) -> "VariancePart":
        """The same with a larger variance, of which the rest is certain."""
        share = self.variance / least
        degrees = most_degrees
        if share:
            degrees = min(degrees, self.degrees / share**2)
        return VariancePart(least, degrees)


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares between seeds, between rows, and of the rest; numbers, or arrays of draws of them."""

    of_seeds: NumberOrDraws
    of_rows: NumberOrDraws
    rest: NumberOrDraws
    seeds: int
    rows: int

    @classmethod
    def of(cls, values_SN: SeedRows) -> "MeanSquares":
        """Those of some values."""
        seeds, rows = values_SN.shape
        free_seeds = seeds - 1
        free_rows = rows - 1
        means_S = values_SN.mean(axis=1)
        means_N = values_SN.mean(axis=0)
        of_seeds = rows * means_S.var(ddof=1)
        of_rows = seeds * means_N.var(ddof=1)
        total = values_SN.size * values_SN.var()
        left = total - free_seeds * of_seeds
        left -= free_rows * of_rows
        free = free_seeds * free_rows
        rest = max(0.0, left) / free
        return cls(
            float(of_seeds),
            float(of_rows),
            float(rest),
            seeds,
            rows,
        )

    @property
    def sum_of_parts(self) -> NumberOrDraws:
        """What estimates the variance of the mean, times seeds and rows: no less than seeds or rows alone show."""
        seeds = self.of_seeds
        rows = self.of_rows
        together = seeds + rows - self.rest
        of_one = np.maximum(seeds, rows)
        return np.maximum(together, of_one)

    @property
    def degrees(self) -> NumberOrDraws:
        """The degrees of freedom of that sum; where all values are equal, one."""
        free_seeds = self.seeds - 1
        free_rows = self.rows - 1
        free = free_seeds * free_rows
        below = self.of_seeds**2 / free_seeds
        below += self.of_rows**2 / free_rows
        below += self.rest**2 / free
        divisor = np.maximum(below, _TINY)
        above = self.sum_of_parts**2
        of_sum = above / divisor
        return np.maximum(1.0, of_sum)

    @property
    def spread(self) -> Spread:
        """The parts that these mean squares say."""
        between_seeds = (self.of_seeds - self.rest) / self.rows
        between_rows = (self.of_rows - self.rest) / self.seeds
        return Spread(
            max(0.0, between_seeds),
            max(0.0, between_rows),
            self.rest,
        )
