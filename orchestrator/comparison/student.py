"""Student's t: how often it exceeds a value, and the value that it seldom exceeds.

t is z / s, where z is normal and s^2 a mean of squares with so many degrees of freedom, whole or not. Its tails are
normal ones, averaged over s: numerically over log s, where that is a smooth hump whatever the degrees.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Degrees = npt.NDArray[np.float64]
_INVERSES = np.geomspace(1e-6, 1.0, 200)  # of degrees of freedom
_POINTS = 160
_REACH = 9.0  # standard deviations that are looked at of a hump that is nearly normal
_FALL = 35.0  # e to the minus this is nothing
_SECANTS = 20
_CLOSE = 1e-9
_ROUNDED_TO = 2  # decimals of degrees of freedom, so that few values are computed


def exceeding(critical: float, degrees: float) -> float:
    """How often the size of t exceeds a value, with so many degrees of freedom."""
    high = _REACH / math.sqrt(2 * degrees)
    low = -high - _FALL / degrees
    logs = np.linspace(low, high, _POINTS)
    squares = np.exp(2 * logs)
    halves = squares / 2
    exponents = degrees * (logs - halves)
    largest = exponents.max()
    densities = np.exp(exponents - largest)
    deviations = np.exp(logs)
    bounds = deviations * critical
    scaled = bounds / math.sqrt(2)
    total = 0.0
    for bound, density in zip(scaled, densities, strict=True):
        total += density * math.erfc(bound)
    whole = densities.sum()
    return float(total / whole)


def critical_value(level: float, degrees: float) -> float:
    """What t exceeds in size as seldom as a two-sided interval of a level misses."""
    at_least_one = max(1.0, degrees)
    rounded = round(at_least_one, _ROUNDED_TO)
    return _critical_value(level, rounded)


def critical_values(level: float, degrees: Degrees) -> Degrees:
    """The same for many degrees of freedom, between values at some of them: right to four digits."""
    known = []
    for inverse in _INVERSES:
        value = _critical_value(level, 1 / inverse)
        known.append(value)
    inverses = 1 / degrees
    return np.interp(inverses, _INVERSES, known)


@lru_cache(maxsize=4096)
def _critical_value(level: float, degrees: float) -> float:
    """The same of degrees that are rounded: by secants, as the logarithms of tail and value are nearly a line."""
    wanted = math.log(1 - level)
    middle = (1 + level) / 2
    z = NormalDist().inv_cdf(middle)
    before = math.log(z)
    correction = (z**2 + 1) / (4 * degrees)
    now = before + math.log1p(correction)
    gap_before = _log_tail(before, degrees) - wanted
    for _ in range(_SECANTS):
        gap = _log_tail(now, degrees) - wanted
        if abs(gap) < _CLOSE or gap == gap_before:
            break
        rise = gap - gap_before
        slope = rise / (now - before)
        before = now
        gap_before = gap
        now -= gap / slope
    return math.exp(now)


def _log_tail(log: float, degrees: float) -> float:
    """The logarithm of how often t exceeds the exponential of a number."""
    critical = math.exp(log)
    tail = exceeding(critical, degrees)
    return math.log(tail)
