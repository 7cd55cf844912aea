"""How the controller of a run is started, and what its exit code says, for all who start one."""

import os
import sys
from collections.abc import Sequence

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run goes on elsewhere, where its scheduler starts it again
# What a controller's environment has where a scheduler starts the run again that it has ended.
REQUEUED = {"FLEETUNE_REQUEUED": "1"}
# What it has where the runs of a job without `tracking.uri` belong to the MLflow of whoever compares, elsewhere.
COLLECTED = {"FLEETUNE_COLLECTED": "1"}
_NODES = "FLEETUNE_NODES"
_END = "FLEETUNE_ALLOCATION_END"


def until_moment(end: float) -> dict[str, str]:
    """What the environment of a controller has where its allocation ends then, in seconds since 1970."""
    return {_END: str(end)}


def end_of_allocation() -> float:
    """When this process's allocation ends, in seconds since 1970; never where that is not known."""
    end = os.environ.get(_END) or "inf"
    return float(end)


def on_nodes(count: int) -> dict[str, str]:
    """What the environment of a controller has where its allocation has so many nodes now."""
    return {_NODES: str(count)}


def nodes_here() -> int | None:
    """How many nodes this process's allocation has; None where it is in none."""
    count = os.environ.get(_NODES)
    return int(count) if count else None


def controller_command(run_dir: str, python: Sequence[str] = (sys.executable,)) -> list[str]:
    """How the controller of a run is started; -P keeps files of the user off the front of sys.path."""
    return [*python, "-P", "-m", "orchestrator.controller", run_dir]


def is_requeued() -> bool:
    """Whether this process is for a run that a scheduler starts again when it has ended it."""
    values = [os.environ.get(name) for name in REQUEUED]
    return any(values)


def is_collected() -> bool:
    """Whether this process is for a run whose rows whoever compares takes to an MLflow elsewhere."""
    values = [os.environ.get(name) for name in COLLECTED]
    return any(values)
