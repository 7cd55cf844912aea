"""What this machine has for workers, without importing anything heavy."""

import os
import re
from pathlib import Path
from typing import Literal


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> int:
    """GPUs that are visible here: those of CUDA_VISIBLE_DEVICES where it is set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = 0
    for path in Path("/dev").glob("nvidia*"):
        if re.fullmatch(r"nvidia\d+", path.name):
            present += 1
    if visible is None:
        return present
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(present, len(named))


def total_capacity() -> tuple[Literal["gpu", "cpu"], int]:
    """What a worker takes one of here, and how many of them there are."""
    number = gpus()
    if number:
        return "gpu", number
    return "cpu", cores()
