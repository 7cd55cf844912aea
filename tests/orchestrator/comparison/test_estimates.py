"""Intervals hold as often as they say, and are those of the literature."""

import math
import random
from collections.abc import Callable

import pytest

from orchestrator.comparison import estimates
from orchestrator.comparison.estimates import Estimate
from orchestrator.comparison.intervals import at_once

TRIES = 600


def coverage(truth: float, draw: Callable[[random.Random], Estimate]) -> float:
    """How often an interval holds the truth."""
    rng = random.Random(0)
    held = 0
    for _ in range(TRIES):
        found = draw(rng)
        held += found.low <= truth <= found.high
    return held / TRIES


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_a_share(p: float, n: int) -> None:
    assert coverage(p, lambda rng: estimates.share([rng.random() < p for _ in range(n)])) > 0.92


@pytest.mark.parametrize(("only_a", "only_b"), [(0.0, 0.0), (0.05, 0.05), (0.2, 0.1), (0.02, 0.0)])
@pytest.mark.parametrize("n", [20, 200])
def test_a_difference_of_shares_on_the_same_rows(only_a: float, only_b: float, n: int) -> None:
    def draw(rng: random.Random) -> Estimate:
        drawn = [rng.random() for _ in range(n)]
        a = [x < only_a or x > 0.6 for x in drawn]
        b = [only_a <= x < only_a + only_b or x > 0.6 for x in drawn]
        return estimates.difference_of_shares(a, b)

    assert coverage(only_a - only_b, draw) > 0.93


@pytest.mark.parametrize("n", [10, 100])
def test_a_difference_of_losses_on_the_same_rows(n: int) -> None:
    def draw(rng: random.Random) -> Estimate:
        weights = [rng.randrange(5, 40) for _ in range(n)]
        rows = [rng.gauss(2, 1) for _ in range(n)]
        b = [w * row for w, row in zip(weights, rows, strict=True)]
        a = [w * (row + 0.1 + rng.gauss(0, 0.2)) for w, row in zip(weights, rows, strict=True)]
        return estimates.difference_of_ratios(a, b, weights)

    assert 0.88 < coverage(0.1, draw) < 0.985


def test_known_values() -> None:
    wilson = estimates.share([True] * 8 + [False] * 2)
    assert (wilson.low, wilson.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    mean = estimates.ratio_of_sums([1.0, 2.0, 3.0, 4.0, 5.0], [1] * 5)
    assert (mean.value, mean.high) == pytest.approx((3.0, 3 + 2.776 * math.sqrt(2.5 / 5)), abs=0.01)
    nothing = estimates.difference_of_shares([True] * 50, [True] * 50)
    assert nothing.low < 0 < nothing.high and not nothing.excludes_zero


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (100, 1.984)])
def test_student(degrees: int, quantile: float) -> None:
    rows = [0.0] * degrees + [1.0]
    found = estimates.ratio_of_sums(rows, [1] * len(rows))
    mean = 1 / len(rows)
    deviation = math.sqrt(mean * (1 - mean) * len(rows) / degrees / len(rows))
    assert (found.high - mean) / deviation == pytest.approx(quantile, rel=0.01)


def test_what_has_no_interval() -> None:
    one = estimates.ratio_of_sums([3.0], [2])
    assert one.to_json() == {"value": 1.5, "low": None, "high": None}
    assert estimates.ratio_of_sums([], []).to_json()["value"] is None


def test_many_at_once_are_wider() -> None:
    assert at_once(1) == pytest.approx(0.95)
    assert at_once(10) == pytest.approx(0.995)
    rows = [True] * 30 + [False] * 20
    assert estimates.share(rows, at_once(10)).high > estimates.share(rows).high
