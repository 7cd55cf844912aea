"""Operations of torch that add in a fixed order, so that a run that is resumed goes on bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic


@contextmanager
def fixed_order() -> Iterator[None]:
    """Within it, operations that have a deterministic form use it."""
    settings: Any = deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill
