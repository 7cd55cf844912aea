"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(true: Callable[[], Found], timeout_s: float = 60, every_s: float | None = None) -> Found:
    """Wait for something that is true, and give it; fails when it does not come.

    Unless it is asked for at fixed times, it is asked for less and less often: what takes long needs the processor.
    """
    began = time.monotonic()
    while not (found := true()):
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, "waited in vain"
        time.sleep(every_s or min(max(waited_s / 20, 0.02), 0.25))
    return found
