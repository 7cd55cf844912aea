"""What is large: all of it for `make matrix`, and a sample for `make test`, which SAMPLE_SEED chooses."""

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest

SEED = int(os.environ.get("SAMPLE_SEED", "0"))


def sampled(cases: Sequence[Any], number: int = 1) -> list[Any]:
    """Values for a test's parameter that is a list of cases: so many of them, and all, marked as `matrix`."""
    few = random.Random(SEED).sample(list(cases), number)
    return [pytest.param(few, id="sample"), pytest.param(list(cases), id="all", marks=pytest.mark.matrix)]


def each_sampled(cases: Sequence[Any], number: int = 1) -> list[Any]:
    """Values for a test's parameter that is one case: those outside of the sample are marked as `matrix`."""
    few = random.Random(SEED).sample(range(len(cases)), number)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*value, marks=() if index in few else pytest.mark.matrix) for index, value in enumerate(values)
    ]
