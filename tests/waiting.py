"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(true: Callable[[], Found], timeout_s: float = 60, every_s: float = 0.02) -> Found:
    """Wait for something that is true, and give it; fails when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
    return found
