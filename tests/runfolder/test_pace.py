"""The time until a run's last step: intervals that hold in 9 of 10 simulated runs, and what is counted in them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runfolder.pace import FEWEST_ROWS, Pace, pace_of

STEPS = 400
RUNS = 300
EVERY = 50
EVALUATION_S = 9.0
Seconds = Callable[[random.Random], Iterator[float]]


def independent(spread: float) -> Seconds:
    """Steps of rows of different lengths."""

    def seconds(rng: random.Random) -> Iterator[float]:
        while True:
            yield rng.lognormvariate(0.0, spread)

    return seconds


def in_stretches(rng: random.Random) -> Iterator[float]:
    """Steps whose speed wanders, as where others use the same machine."""
    level = rng.gauss(0.0, 0.1)
    while True:
        level = 0.7 * level + rng.gauss(0.0, 0.07)
        yield 1.0 + level


def of_a_run(seconds: Iterator[float]) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of a run, its first two steps slow, and what its evaluations took."""
    rows = []
    evaluations = []
    now = 0.0
    for step in range(1, STEPS + 1):
        now += next(seconds) + (30.0 if step <= 2 else 0.0)
        rows.append({"step": step, "time": now, "loss": 1.0})
        if step % EVERY == 0:
            now += EVALUATION_S
            evaluations.append(EVALUATION_S)
            rows.append({"step": step, "time": now, "eval_loss": 1.0})
    return rows, evaluations


@pytest.mark.parametrize("seen", [FEWEST_ROWS, 100])
@pytest.mark.parametrize(
    "seconds", [independent(0.02), independent(0.2), in_stretches], ids=["even", "uneven", "stretches"]
)
def test_the_interval_holds_in_nine_of_ten_runs(seconds: Seconds, seen: int) -> None:
    held = 0
    widths = []
    for number in range(RUNS):
        rows, _ = of_a_run(seconds(random.Random(number)))
        place = next(place for place, row in enumerate(rows) if row["step"] == seen) + 1
        pace = pace_of(rows[:place], [EVALUATION_S], EVERY)
        assert pace is not None
        found = pace.remaining(seen, STEPS)
        left = rows[-1]["time"] - rows[place - 1]["time"]
        if rows[place]["step"] == seen:  # its evaluation was not made yet where it stopped
            left -= EVALUATION_S
        held += found.low <= left <= found.high
        widths.append((found.high - found.low) / 2 / left)
    assert held >= 0.9 * RUNS
    if seconds is not in_stretches:
        assert sorted(widths)[RUNS // 2] < 0.12


def test_even_steps_are_foretold_within_five_percent_after_twenty() -> None:
    rows, _ = of_a_run(independent(0.02)(random.Random(1)))
    pace = pace_of(rows[:FEWEST_ROWS], [EVALUATION_S], EVERY)
    assert pace is not None
    found = pace.remaining(FEWEST_ROWS, STEPS)
    left = rows[-1]["time"] - rows[FEWEST_ROWS - 1]["time"]
    assert found.likely == pytest.approx(left, rel=0.05)
    assert (found.high - found.low) / 2 < 0.05 * left


def test_nothing_is_told_of_few_steps() -> None:
    rows, _ = of_a_run(independent(0.1)(random.Random(0)))
    assert pace_of(rows[: FEWEST_ROWS - 1], [], None) is None
    assert pace_of(rows[:FEWEST_ROWS], [], None) is not None


def test_evaluations_that_are_left_are_counted() -> None:
    pace = Pace(1.0, 0.0, 20, 0.0, EVALUATION_S, EVERY)
    assert pace.remaining(100, 400).likely == 300 + 6 * EVALUATION_S
    assert pace.remaining(120, 410).likely == 290 + 7 * EVALUATION_S
    assert Pace(1.0, 0.0, 20, 0.0, EVALUATION_S).remaining(100, 400).likely == 300 + EVALUATION_S
    assert Pace(1.0, 0.0, 20, 0.0).remaining(400, 400).high == 0.0
