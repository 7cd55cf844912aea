"""What is large: all of it for `make matrix`, and a sample for `make test`, which SAMPLE_SEED chooses."""

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest

SEED = int(os.environ.get("SAMPLE_SEED", "0"))
# Methods whose tests train at several layouts, resume and export. Of all methods, test_matrix.py has samples too.
WITH_LAYOUTS = ("adalora", "bottleneck", "full", "galore", "longlora", "qlora", "relora", "virtual")
FEW_METHODS = random.Random(SEED).sample(WITH_LAYOUTS, 2)


def sampled(cases: Sequence[Any], number: int = 1) -> list[Any]:
    """Values for a test's parameter that is a list of cases: so many of them, and all, marked as `matrix`."""
    few = random.Random(SEED).sample(list(cases), number)
    return [pytest.param(few, id="sample"), pytest.param(list(cases), id="all", marks=pytest.mark.matrix)]


def method_sampled(method: str, cases: Sequence[Any], number: int = 1) -> list[Any]:
    """As `sampled`, for a test of one method's layouts: `make test` runs those of a few methods alone."""
    few, whole = sampled(cases, number)
    if method in FEW_METHODS:
        return [few, whole]
    return [whole]


def each_sampled(cases: Sequence[Any], number: int = 1) -> list[Any]:
    """Values for a test's parameter that is one case: those outside of the sample are marked as `matrix`."""
    few = random.Random(SEED).sample(range(len(cases)), number)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*value, marks=() if index in few else pytest.mark.matrix) for index, value in enumerate(values)
    ]
