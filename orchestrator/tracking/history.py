"""What a run reported: the rows of all attempts as one series, each value once.

For each metric and step the first row that was written within the seals counts, and it counts for ever. Rows past the
checkpoint that a successor starts from count too: they may have been reported, so leaving them out (and then letting
the successor's row stand for them) would report a loss a second time, with another time and maybe another value.
Sealed rows never change and the live attempt only appends, so the series only grows, and everybody who reads it (a
paused attempt that wakes, too: what it read before its fence check lies within its seal) sees the same rows.
"""

from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

from runfolder.appended import ChunkSource, Follower, parse_lines, read_from
from runfolder.files import Record


@dataclass(frozen=True)
class AppendedRow:
    """One appended row: the values that count, and those that repeat what counts already as (first, now)."""

    index: int  # position in the file joined over all attempts
    attempt: int
    step: int
    time: float
    fresh: dict[str, float]
    again: dict[str, tuple[float, float]]


class RowReader:
    """One appended file of a run, joined over the attempts up to `number`; read it as often as it grows."""

    def __init__(self, file: str, source: ChunkSource, number: float = inf) -> None:
        self._file = file
        self._source = source
        self._follower = Follower()
        self._last_attempt = number
        self._values_of_step: dict[int, dict[str, float]] = {}  # those that count
        self.count = 0

    def read(self) -> list[AppendedRow]:
        """The rows that were appended since the last call, oldest first."""
        rows: list[AppendedRow] = []
        is_behind = True
        while is_behind:
            chunks = list(self._source(self._follower.since))
            is_behind = any(chunk.is_full for chunk in chunks)
            for attempt, data in self._follower.take(chunks):
                if attempt > self._last_attempt:
                    return rows
                for record in parse_lines(data, self._file):
                    rows.append(self._row(attempt, record))
        return rows

    def _row(self, attempt: int, record: Record) -> AppendedRow:
        """The next row: each of its values counts, unless an earlier row of that step had one for that metric."""
        step = record["step"]
        counted = self._values_of_step.setdefault(step, {})
        fresh = {}
        again = {}
        for metric, value in _metrics(record).items():
            if metric in counted:
                again[metric] = (counted[metric], value)
            else:
                fresh[metric] = value
        row = AppendedRow(self.count, attempt, step, record["time"], fresh, again)
        counted.update(fresh)
        self.count += 1
        return row


def history(run_dir: Path) -> list[Record]:
    """One record per (step, kind), sorted: step, kind (`train` or `eval`), attempt, time and the metrics.

    `attempt` and `time` are those of the first row of that step.
    """
    records: dict[tuple[int, str], Record] = {}
    file = "metrics.jsonl"
    reader = RowReader(file, partial(read_from, run_dir, file))
    for row in reader.read():
        if row.fresh:
            kind = _kind_of_row(row)
            key = (row.step, kind)
            head = {"step": row.step, "kind": kind, "attempt": row.attempt, "time": row.time}
            record = records.setdefault(key, head)
            record.update(row.fresh)
    return sorted(records.values(), key=_place)


def _place(record: Record) -> tuple[int, bool]:
    """What records are sorted by: within a step, `train` comes before `eval`."""
    is_eval = record["kind"] == "eval"
    return record["step"], is_eval


def _kind_of_row(row: AppendedRow) -> str:
    for metric in row.fresh:
        if metric.startswith("eval_"):
            return "eval"
    return "train"


def _metrics(record: Record) -> dict[str, float]:
    """The numbers in a record beside its step and time, by metric."""
    metrics = {}
    for name, value in record.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name not in ("step", "time"):
            metrics[name] = float(value)
    return metrics
