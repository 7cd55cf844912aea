"""What this machine has for workers, without importing anything heavy."""

import os
import re
from pathlib import Path
from typing import Literal

from runfolder.resources import Resources

_WORKERS_PER_CORE = 4  # each takes a gigabyte of memory, and starts for seconds


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


def misfit_of(resources: Resources, kind: Literal["gpu", "cpu"], total: int) -> str | None:
    """Why workers can never fit on a machine with so many GPUs, or cores and no GPU; None where they do."""
    wanted = resources.world_size
    if kind == "cpu" and resources.gpus_per_node:
        found = f"resources.gpus_per_node: found {resources.gpus_per_node}"
        return f"{found}; this machine has no GPU: allowed is workers_per_node"
    if kind == "gpu" and wanted > total:
        return f"resources: found {wanted} workers of one GPU each; this machine has {total}"
    most = _WORKERS_PER_CORE * total
    if kind == "cpu" and wanted > most:
        found = f"resources: found {wanted} workers; this machine has {total} cores"
        return f"{found}: allowed are at most {most}, which share them"
    return None


def capacity_in_words(workers: int) -> str:
    """The capacity that a run takes, in words."""
    kind, _ = total_capacity()
    number = capacity_needed(workers)
    if number == 1:
        return f"1 {kind}"
    return f"{number} {kind}s"


def capacity_needed(workers: int) -> int:
    """The capacity that a run takes: on cores more workers than there are take them all, and share."""
    _, total = total_capacity()
    return min(workers, total)
