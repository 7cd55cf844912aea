"""Following a run until it ends: its log, and a progress bar with the remaining time where there is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from clusters.base import Unreachable
from orchestrator.logs import LogReader
from orchestrator.runs import Handle, find
from orchestrator.status import ENDED, Status, statuses
from orchestrator.tracking.history import Spool

_PAUSE_S = 0.5  # between two looks at a run
_PATIENCE_S = 60.0  # for a run whose cluster says nothing, or does not get further
_LINE_S = 10.0  # between two lines about the same state, where there is no terminal

Show = Callable[[Status, dict[str, float], str], None]


def follow(run: Handle, rank: int | None) -> Status:
    """Show a run, with the log of a rank if one is given, until it has ended; gives its last status.

    Raises Unreachable when nobody knows the run, or its cluster cannot start it, for a minute; it may go on later.
    """
    reader = LogReader(run, rank) if rank is not None else None
    with _bar() if sys.stdout.isatty() else _lines(quiet=reader is not None) as show:
        for status, figures in _watch(run):
            show(status, figures, reader.read(final=status.state in ENDED) if reader else "")
    return status


def wait(reference: str) -> Status:
    """Wait for the end of a run, and give its last status; raises as `follow` does."""
    for status, _ in _watch(find(reference)):
        ended = status
    return ended


def _watch(run: Handle) -> Iterator[tuple[Status, dict[str, float]]]:
    """The run's status and its newest figures, twice a second, until it has ended."""
    site = run.site
    spool = Spool(lambda since: site.read(run.run_id, {"metrics.jsonl": since})["metrics.jsonl"])
    figures: dict[str, float] = {}
    hopeful = time.monotonic()
    while True:
        (status,) = statuses([run])
        for row in spool.read():
            figures |= row.fresh
        yield status, figures
        if status.state in ENDED:
            return
        if status.state != "unknown" and not status.stuck:
            hopeful = time.monotonic()
        elif time.monotonic() - hopeful > _PATIENCE_S:
            raise Unreachable(f"run {run.run_id}: {status.reason}; look again with: fleetune status")
        time.sleep(_PAUSE_S)


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), speed_estimate_period=120) as progress:
        task = progress.add_task("", total=None, figures="")

        def show(status: Status, figures: dict[str, float], log: str) -> None:
            if log:
                progress.console.print(log, end="", markup=False, highlight=False, soft_wrap=True)
            progress.update(
                task,
                description=status.state,
                completed=status.step,
                total=status.steps,
                figures=_figures(figures),
            )

        yield show


@dataclass
class _Lines:
    """A line where state or reason changes, and now and then one about the step; with `quiet` the log alone."""

    quiet: bool
    _last: tuple[str, str | None, int] = ("", None, 0)
    _time: float = field(default=0.0)

    def __call__(self, status: Status, figures: dict[str, float], log: str) -> None:
        sys.stdout.write(log)
        now = (status.state, status.reason, status.step)
        due = now[:2] != self._last[:2] or (now != self._last and time.monotonic() - self._time > _LINE_S)
        if due and not self.quiet:
            reason = f" ({status.reason})" if status.reason else ""
            print(f"{status.state}{reason}  step {status.step}/{status.steps or '?'}  {_figures(figures)}".rstrip())
            self._last, self._time = now, time.monotonic()
        sys.stdout.flush()


@contextmanager
def _lines(quiet: bool) -> Iterator[Show]:
    yield _Lines(quiet)


def _figures(figures: dict[str, float]) -> str:
    shown = {"loss": "{:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "eval_exact_match": "{:.1%}"}
    named = {"loss": "loss ", "tokens_per_second": "", "eval_exact_match": "exact match "}
    return "  ".join(named[key] + form.format(figures[key]) for key, form in shown.items() if key in figures)
