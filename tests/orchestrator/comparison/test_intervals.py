"""Intervals, held against simulated comparisons whose true difference is known, and against published tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest

from orchestrator.comparison.intervals import (
    at_once,
    contrast,
    contrast_of_seeds,
    contrast_unpaired,
    ratio_values,
)
from orchestrator.comparison.power import power, rows_needed, seeds_needed, smallest_difference
from orchestrator.comparison.student import critical_value, exceeding
from orchestrator.comparison.variances import SeedRows, Spread

FEW, ALL = 400, 2000
NORMAL = NormalDist()


@dataclass(frozen=True)
class World:
    """How right two configurations are on a row: each has thresholds that rows, seeds and chance move, all normal."""

    row: float = 1.0
    seed: float = 0.03  # about one point of spread between seeds
    row_of_method: float = 0.3
    rest: float = 0.3
    shared: float = 0.3  # of a seed's effect, by which both configurations move

    def rights(self, rng: np.random.Generator, share: float, better: float, seeds: int, rows: int) -> list[SeedRows]:
        """Two [seeds, rows] of 0 and 1 that are right on these shares of all rows, by all seeds."""
        scale = np.sqrt(self.row**2 + self.seed**2 + self.row_of_method**2 + self.rest**2)
        of_rows = self.row * rng.normal(size=rows)
        together = np.sqrt(self.shared) * rng.normal(size=(seeds, 1))
        found = []
        for right in (share, share + better):
            apart = np.sqrt(1 - self.shared) * rng.normal(size=(seeds, 1))
            moved = self.seed * (together + apart) + self.row_of_method * rng.normal(size=rows)
            chance = self.rest * rng.normal(size=(seeds, rows))
            found.append((NORMAL.inv_cdf(right) * scale + of_rows + moved + chance > 0).astype(float))
        return found


WORLDS = (World(), World(seed=0), World(seed=0.06), World(row_of_method=0, rest=0.5), World(rest=0.1))


def designs(rng: np.random.Generator, count: int) -> Iterator[tuple[World, float, int, int]]:
    """A world, a share that is right, and numbers of seeds and rows, of so many comparisons."""
    for number in range(count):
        world = WORLDS[number % len(WORLDS)]
        yield world, rng.uniform(0.3, 0.7), int(rng.integers(3, 11)), int(rng.integers(100, 2001))


def covered(count: int, seed: int, paired: bool) -> float:
    """Of so many comparisons, the share whose interval of 95 % has the true difference."""
    rng = np.random.default_rng(seed)
    hits = 0
    for world, share, seeds, rows in designs(rng, count):
        better = rng.uniform(-0.05, 0.05)
        first, second = world.rights(rng, share, better, seeds, rows)
        found = contrast(second - first) if paired else contrast_unpaired(second, first[: max(3, seeds - 2)])
        low, high = found.interval()
        hits += low <= better <= high
    return hits / count


def false_alarms(count: int, seed: int) -> float:
    """The share of comparisons of a configuration with itself, under other seeds, that show a difference."""
    rng = np.random.default_rng(seed)
    alarms = 0
    for world, share, seeds, rows in designs(rng, count):
        first, second = world.rights(rng, share, 0.0, seeds, rows)
        low, high = contrast(second - first).interval()
        alarms += not low <= 0 <= high
    return alarms / count


def forecast_and_found(
    count: int, seed: int, world: World, better: float, seeds: int, rows: int
) -> tuple[float, float]:
    """The power that a large sample's spread forecasts, and the share of comparisons that show the difference."""
    rng = np.random.default_rng(seed)
    first, second = world.rights(rng, 0.5, better, 200, 4000)
    spread = contrast(second - first).spread
    assert spread
    found = 0
    for _ in range(count):
        first, second = world.rights(rng, 0.5, better, seeds, rows)
        low, high = contrast(second - first).interval()
        found += not low <= 0 <= high
    return power(spread, better, seeds, rows), found / count


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_the_truth_in_a_sample(paired: bool) -> None:
    assert 0.92 <= covered(FEW, 1, paired) <= 0.98


def test_equal_ones_differ_seldom_in_a_sample() -> None:
    assert false_alarms(FEW, 2) <= 0.08


def test_power_is_as_forecast_in_a_sample() -> None:
    forecast, found = forecast_and_found(FEW, 3, World(), 0.04, 4, 500)
    assert 0.5 < forecast < 0.95
    assert abs(forecast - found) <= 0.08


@pytest.mark.soak
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_the_truth(paired: bool) -> None:
    assert 0.935 <= covered(ALL, 10, paired) <= 0.965


@pytest.mark.soak
def test_equal_ones_differ_seldom() -> None:
    assert false_alarms(ALL, 20) <= 0.065


@pytest.mark.soak
@pytest.mark.parametrize(
    ("world", "better", "seeds", "rows"),
    [(World(), 0.04, 4, 500), (World(), 0.02, 8, 1500), (World(seed=0.06), 0.05, 5, 1000), (WORLDS[3], 0.03, 3, 800)],
)
def test_power_is_as_forecast(world: World, better: float, seeds: int, rows: int) -> None:
    forecast, found = forecast_and_found(ALL, 30, world, better, seeds, rows)
    assert 0.2 < forecast < 0.99
    assert abs(forecast - found) <= 0.03


@pytest.mark.parametrize(
    ("level", "degrees", "value"),
    [(0.95, 1, 12.7062), (0.95, 4, 2.7764), (0.99, 10, 3.1693), (0.95, 1e6, 1.95996), (1 - 0.05 / 15, 4, 6.2541)],
)
def test_critical_values_are_those_of_the_tables(level: float, degrees: float, value: float) -> None:
    assert critical_value(level, degrees) == pytest.approx(value, rel=2e-5)
    assert exceeding(critical_value(level, degrees), degrees) == pytest.approx(1 - level, rel=1e-6)


def test_the_number_of_seeds_is_that_of_the_textbook() -> None:
    """Of unpaired seeds with a spread of 0.9 points: 14 for one point, 5 for two, at 5 % and a power of 80 %."""
    difference_of_seeds = Spread(seeds=0.9**2, rows=0.0, rest=0.0)
    paired = seeds_needed(difference_of_seeds, 1.0, 10**6)
    assert paired == 9  # half the variance of an unpaired one, and half the degrees of freedom
    assert seeds_needed(difference_of_seeds, 1.0, 10**6, at_once(15)) == pytest.approx(17, abs=1)


def test_with_few_rows_more_seeds_buy_nothing() -> None:
    spread = Spread(seeds=0.0001, rows=0.1, rest=0.05)
    assert seeds_needed(spread, 0.01, 200) is None
    rows = rows_needed(spread, 0.01, 20)
    assert rows is not None and rows > 1000
    assert smallest_difference(spread, 20, rows) == pytest.approx(0.01, rel=0.01)
    assert power(spread, 0.01, 20, rows) == pytest.approx(0.8, abs=0.01)
    assert rows_needed(spread, 0.01, 2) is None


def test_an_interval_of_a_ratio_is_centred_on_it_and_covers_it() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        weights = rng.integers(1, 40, size=300).astype(float)
        sums = weights * (0.02 + 0.1 * rng.normal(size=300) + 0.03 * rng.normal(size=(4, 1)))
        found = contrast(ratio_values(sums, weights))
        assert found.value == pytest.approx(np.mean(sums.sum(axis=1) / weights.sum()))
        low, high = found.interval()
        hits += low <= 0.02 <= high
    assert 0.91 <= hits / 300 <= 0.98


@pytest.mark.parametrize(("share", "better", "seeds", "rows"), [(0.975, 0.015, 3, 100), (0.99, 0.005, 5, 200)])
def test_intervals_cover_where_few_rows_disagree(share: float, better: float, seeds: int, rows: int) -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(FEW):
        places = rng.random(rows)
        is_first = places < share
        is_second = places < share + better
        differences = np.tile(is_second.astype(float) - is_first, (seeds, 1))
        low, high = contrast(differences).interval()
        hits += low <= better <= high
    assert hits / FEW >= 0.93


def test_rows_on_which_nobody_disagrees_do_not_say_that_all_are_equal() -> None:
    several = contrast(np.zeros((3, 100)))
    low, high = several.interval()
    one_seed = contrast(np.zeros((1, 100)))
    assert (several.degrees, (low, high)) == (99, pytest.approx(one_seed.interval(), rel=0.01))
    assert several.spread and several.spread.variance(3, 100) == pytest.approx(several.error**2)
    one_row = np.zeros((3, 100))
    one_row[:, 0] = 1.0
    assert contrast(one_row).half_width() == pytest.approx(several.half_width(), rel=0.01)


def test_what_one_seed_or_no_rows_can_say() -> None:
    single = contrast_of_seeds(np.array([0.4]))
    assert (single.value, single.half_width()) == (0.4, float("inf"))
    alike = contrast_of_seeds(np.array([0.8, 0.7 + 0.1, 0.8]))
    assert (alike.value, alike.half_width(), alike.seeds) == (pytest.approx(0.8), float("inf"), 3)
    both_alike = contrast_unpaired(np.full((3, 1), 0.8), np.full((2, 1), 0.7))
    assert (both_alike.value, both_alike.half_width()) == (pytest.approx(0.1), float("inf"))
    rows_alone = contrast(np.array([[1.0, 0.0, 0.0, 0.0] * 50]))
    assert (rows_alone.scope, rows_alone.seeds, rows_alone.rows) == ("rows", 1, 200)
    low, high = rows_alone.interval()
    assert low > 0.15 and high < 0.35
    undecided = contrast(np.array([[1.0] + [0.0] * 199]))
    low, _ = undecided.interval()
    assert low < 0
    assert contrast(np.full((3, 5), 0.5)).interval() == (0.5, 0.5)
    unlike = contrast_unpaired(np.array([[0.5], [0.6]]), np.array([[0.2], [0.3], [0.1]]))
    assert (unlike.value, unlike.scope) == (pytest.approx(0.35), "seeds")
