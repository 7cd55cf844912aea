"""What a run reported: the rows of all attempts as one series, each value once.

For each metric and step the first row that was written within the seals counts, and it counts for ever. Rows past the
checkpoint that a successor starts from count too: they may have been reported, so leaving them out (and then letting
the successor's row stand for them) would report a loss a second time, with another time and maybe another value.
Sealed rows never change and the live attempt only appends, so the series only grows, and everybody who reads it (a
paused attempt that wakes, too: what it read before its fence check lies within its seal) sees the same rows.
"""

from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

from runfolder.appended import Follower, Source, parsed, read_from
from runfolder.files import Record


@dataclass(frozen=True)
class Row:
    """One appended row: the values that count, and those that repeat what counts already as (first, now)."""

    index: int  # position in the file joined over all attempts
    attempt: int
    step: int
    time: float
    fresh: dict[str, float]
    again: dict[str, tuple[float, float]]


class Spool:
    """One appended file of a run, joined over the attempts up to `number`; read it as often as it grows."""

    def __init__(self, source: Source, number: float = float("inf")) -> None:
        self._follower, self._number = Follower(source), number
        self._first: dict[int, dict[str, float]] = {}
        self.count = 0

    def read(self) -> list[Row]:
        """The rows that were appended since the last call, oldest first."""
        new = takewhile(lambda found: found[0] <= self._number, self._follower.read())
        return [self._join(attempt, record) for attempt, data in new for record in parsed(data)]

    def _join(self, attempt: int, record: Record) -> Row:
        first = self._first.setdefault(record["step"], {})
        values = _numbers(record)
        row = Row(
            self.count,
            attempt,
            record["step"],
            record["time"],
            {key: value for key, value in values.items() if key not in first},
            {key: (first[key], value) for key, value in values.items() if key in first},
        )
        first.update(row.fresh)
        self.count += 1
        return row


def history(run_dir: Path) -> list[Record]:
    """One record per (step, kind), sorted: step, kind (`train` or `eval`), attempt, time and the metrics.

    `attempt` and `time` are those of the first row of that step.
    """
    records: dict[tuple[int, str], Record] = {}
    for row in Spool(partial(read_from, run_dir, "metrics.jsonl")).read():
        kind = "eval" if any(key.startswith("eval_") for key in row.fresh) else "train"
        if row.fresh:
            head = {"step": row.step, "kind": kind, "attempt": row.attempt, "time": row.time}
            records.setdefault((row.step, kind), head).update(row.fresh)
    return sorted(records.values(), key=lambda record: (record["step"], record["kind"] == "eval"))


def _numbers(record: Record) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
    }
