"""Following a run until it ends: its log, and a progress bar with the remaining time where there is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.history import Spool
from orchestrator.logs import LogReader
from orchestrator.status import ENDED, Status, status

_PAUSE = 0.5  # seconds between two looks at a run


def follow(run_dir: Path, rank: int | None) -> Status:
    """Print the log of a rank (None: only a line where the state changes) until the run has ended."""
    show = _bar if sys.stdout.isatty() else _lines
    return show(run_dir, rank)


def _watch(run_dir: Path) -> Iterator[tuple[Status, dict[str, float]]]:
    """The run's status and its newest figures, twice a second, until it has ended."""
    spool, figures = Spool(run_dir, "metrics.jsonl"), {}
    while True:
        found = status(run_dir)
        for row in spool.read():
            figures |= row.fresh
        yield found, figures
        if found.state in ENDED:
            return
        time.sleep(_PAUSE)
