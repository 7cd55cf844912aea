"""What a run has cost: the memory that was foretold and that was measured, and how well it used its devices.

Plans of later jobs go by it. `work` is what the trainer announced of a run: {method, objective, zero, offload,
kernels, checkpointing, master_weights, precision, workers, device, peak (FLOP/s of a device), flops_per_token,
batch_tokens}.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runfolder.appended import read_lines
from runfolder.chain import attempts
from runfolder.files import Record

WARM_UP = 2  # steps of an attempt that are left out: they compile, and fill caches
FEWEST_STEPS = 10  # from which anything is said of speed


@dataclass(frozen=True)
class Costs:
    """What an attempt did, and what that took; None where it is not known.

    Memory is in bytes, of the longest micro-batch in training. `utilisation` is the share of the devices' arithmetic
    that was used from the first steps to the last one, with the evaluations and saves between them.
    """

    work: Record
    foretold: int | None = None
    measured: int | None = None
    utilisation: float | None = None


def read_costs(run_dir: Path) -> Costs | None:
    """The costs of the newest attempt that came to its first step; None before one has."""
    for attempt in reversed(attempts(run_dir)):
        events = read_lines(attempt, "events.jsonl")
        costs = costs_of(events, read_lines(attempt, "metrics.jsonl"))
        if costs is not None:
            return costs
    return None


def costs_of(events: Iterable[Record], rows: Sequence[Record]) -> Costs | None:
    """The costs of an attempt with these events and rows; a pure function."""
    work = foretold = measured = None
    for event in events:
        kind = event["event"]
        if kind == "plan":
            work = event.get("work")
        elif kind == "foretold":
            foretold = event.get("bytes")
        elif kind == "calibrated" and event.get("what") == "training":
            measured = event.get("bytes")
    if not isinstance(work, dict):  # of an earlier version
        return None
    return Costs(work, foretold, measured, utilisation_of(work, rows))


def utilisation_of(work: Record, rows: Iterable[Record]) -> float | None:
    """The share of the devices' arithmetic that was used; None where too few steps say so."""
    steps = [row for row in rows if "loss" in row]
    settled = steps[WARM_UP:]
    if len(settled) < FEWEST_STEPS:
        return None
    first = settled[0]
    last = settled[-1]
    number = last["step"] - first["step"]
    seconds = last["time"] - first["time"]
    flops = number * work["batch_tokens"] * work["flops_per_token"]
    possible = seconds * work["peak"] * work["workers"]
    return float(flops / possible)
