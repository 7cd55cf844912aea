"""Following a run until it ends: its log, and a progress bar with the remaining time where there is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from clusters.base import Unreachable
from orchestrator.logs import LogReader
from orchestrator.runs import Handle, find
from orchestrator.status import ENDED, Status, statuses
from orchestrator.terminal.status_text import activity_text
from orchestrator.tracking.history import RowReader
from runfolder.appended import Chunk, Position

_PAUSE_S = 0.5  # between two looks at a run
_FOLLOW_TIMEOUT_S = 60.0  # for a run whose cluster says nothing, or does not get further
_LINE_S = 10.0  # between two lines about the same state, where there is no terminal

_METRIC_FORMATS = {  # of the metrics that are shown
    "reward": "reward {:.4f}",
    "loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "eval_exact_match": "exact match {:.1%}",
}

ShowStatus = Callable[[Status, dict[str, float], str], None]


def follow(run: Handle, reader: LogReader | None) -> Status:
    """Show a run, with its log if there is a reader of it, until it has ended; gives its last status.

    A link that was cut is made again, and the log goes on where it was. Raises Unreachable when nobody knows the run,
    or its cluster cannot start it, for a minute; it may go on later.
    """
    display = _bar_display() if sys.stdout.isatty() else _line_display(quiet=reader is not None)
    with display as show:
        for status, metrics in watch(run):
            for log in _new_lines(reader, ended=status.state in ENDED):
                show(status, metrics, log)
    return status


def _new_lines(reader: LogReader | None, ended: bool) -> Iterator[str]:
    """What is new in a log, in parts; where the link is cut, the next look has it, and only the last one raises."""
    if reader is None:
        yield ""
        return
    try:
        yield from reader.parts(final=ended)
    except Unreachable:
        if ended:
            raise
        yield ""


def wait(reference: str) -> Status:
    """Wait for the end of a run, and give its last status; raises as `follow` does."""
    for status, _ in watch(find(reference)):
        ended = status
    return ended


def watch(run: Handle) -> Iterator[tuple[Status, dict[str, float]]]:
    """The run's status and its newest metrics, twice a second, until it has ended."""
    reader = _metrics_reader(run)
    metrics: dict[str, float] = {}
    last_well = time.monotonic()  # when its cluster knew the run and could get further
    while True:
        (status,) = statuses([run])
        with suppress(Unreachable):
            for row in reader.read():
                metrics |= row.fresh
        yield status, metrics
        if status.state in ENDED:
            return
        if status.state != "unknown" and not status.stuck:
            last_well = time.monotonic()
        elif time.monotonic() - last_well > _FOLLOW_TIMEOUT_S:
            raise Unreachable(f"run {run.run_id}: {status.reason}; look again with: fleetune status")
        time.sleep(_PAUSE_S)


def _metrics_reader(run: Handle) -> RowReader:
    """The metrics of a run, from wherever its folder is."""
    site = run.site
    file = "metrics.jsonl"

    def read_since(position: Position) -> list[Chunk]:
        by_file = site.read(run.run_id, {file: position})
        return by_file[file]

    return RowReader(file, read_since)


@contextmanager
def _bar_display() -> Iterator[ShowStatus]:
    """A bar for the steps, and below it what is being done now."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    state = TextColumn("{task.description}")
    metrics_column = TextColumn("{task.fields[metrics]}")
    columns = (state, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), metrics_column)
    progress = Progress(*columns, speed_estimate_period=120)
    task = progress.add_task("", total=None, metrics="")
    with Live(progress) as live:

        def show(status: Status, metrics: dict[str, float], log: str) -> None:
            if log:
                live.console.print(log, end="", markup=False, highlight=False, soft_wrap=True)
            progress.update(
                task,
                description=status.shown_state,
                completed=status.step,
                total=status.steps,
                metrics=_metrics_text(metrics),
            )
            now = Text(_activity_line(status), no_wrap=True, overflow="ellipsis")
            live.update(Group(progress, now))

        yield show


@dataclass
class _Lines:
    """A line where state or reason changes, and now and then one about what is done; with `quiet` the log alone."""

    quiet: bool
    _last_state: tuple[str, str | None] = ("", None)  # with its reason
    _last_doing: tuple[int, str] = (0, "")  # with the step before
    _time: float = field(default=0.0)

    def __call__(self, status: Status, metrics: dict[str, float], log: str) -> None:
        sys.stdout.write(log)
        if self._is_due(status) and not self.quiet:
            print(_status_line(status, metrics))
            self._last_state = (status.state, status.reason)
            self._last_doing = _doing(status)
            self._time = time.monotonic()
        sys.stdout.flush()

    def _is_due(self, status: Status) -> bool:
        """Whether state or reason are others than in the last line, or what is done is and that is a while ago."""
        state = (status.state, status.reason)
        if state != self._last_state:
            return True
        does_something_else = _doing(status) != self._last_doing
        since_line_s = time.monotonic() - self._time
        return does_something_else and since_line_s > _LINE_S


@contextmanager
def _line_display(quiet: bool) -> Iterator[ShowStatus]:
    yield _Lines(quiet)


def _status_line(status: Status, metrics: dict[str, float]) -> str:
    state = status.shown_state
    if status.reason:
        state = f"{state} ({status.reason})"
    steps = status.steps or "?"
    step = f"step {status.step}/{steps}"
    parts = filter(None, [state, step, _metrics_text(metrics), _activity_line(status)])
    return "  ".join(parts)


def _doing(status: Status) -> tuple[int, str]:
    """The last step, and what is being done."""
    doing = ""
    if status.activity:
        doing = status.activity.doing
    return status.step, doing


def _activity_line(status: Status) -> str:
    """What a run does now and for how long; empty where that is not known, and once it has ended."""
    if status.activity is None or status.state in ENDED:
        return ""
    return activity_text(status, status.activity)


def _metrics_text(metrics: dict[str, float]) -> str:
    texts = []
    for name, form in _METRIC_FORMATS.items():
        if name in metrics:
            texts.append(form.format(metrics[name]))
    return "  ".join(texts)
