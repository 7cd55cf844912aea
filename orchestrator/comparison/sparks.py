"""Curves in a terminal: of what runs on preferences report, a line for each run."""

import math
from collections.abc import Iterator, Sequence

from rich.text import Text

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.group import SEED
from orchestrator.comparison.measure import CURVE_KINDS, CurveKind
from orchestrator.comparison.plots import has_curve
from orchestrator.comparison.row import ComparisonRow
from orchestrator.comparison.run import Curve, TrackedRun

# Of each row of these, the first that some run has: a terminal is no place for all of them.
_IN_TERMINAL = (
    ("eval_accuracy", "accuracy"),
    ("eval_reward_margin", "reward_margin"),
    ("reward",),
    ("kl", "divergence"),
    ("labels_chosen", "answer_tokens"),
)
_BARS = "▁▂▃▄▅▆▇█"
_BROKEN = "!"  # in the place of what is not finite
_MOST_BARS, _NAME_WIDTH = 32, 24


def spark_lines(comparison: Comparison) -> Iterator[Text]:
    """The curves of runs on preferences: below a heading for each kind, a line for each run; nothing without any."""
    kinds = {kind.key: kind for kind in CURVE_KINDS}
    for keys in _IN_TERMINAL:
        reported = []
        for key in keys:
            if has_curve(comparison, kinds[key]):
                reported.append(kinds[key])
        for kind in reported[:1]:
            yield Text(f"\n{kind.title}", style="bold")
            for line in _lines_of_kind(comparison, kind):
                yield Text(line)


def _lines_of_kind(comparison: Comparison, kind: CurveKind) -> Iterator[str]:
    """A line for each run that has a curve of a kind, all on one scale."""
    labelled = []
    values: list[float] = []
    for row in comparison.rows:
        for run in row.runs:
            curve = run.curves.get(kind.key)
            if curve:
                label = _label_of_run(row, run)
                labelled.append((label, curve))
                values += _finite_values(curve)
    low = min(values, default=0.0)
    high = max(values, default=0.0)
    width = max(len(label) for label, _ in labelled)
    width = min(width, _NAME_WIDTH)
    for label, curve in labelled:
        name = label[:_NAME_WIDTH].ljust(width)
        bars = _bars(curve, low, high)
        _, first = curve[0]
        _, last = curve[-1]
        yield f"  {name}  {bars}  {kind.show(first)} → {kind.show(last)}"


def _finite_values(curve: Curve) -> list[float]:
    """The values of a curve that are finite."""
    values = []
    for _, value in curve:
        values.append(value)
    return list(filter(math.isfinite, values))


def _bars(curve: Curve, low: float, high: float) -> str:
    """A curve as bars between two values; a bar stands for the mean of a stretch of steps."""
    count = min(len(curve), _MOST_BARS)
    bars = ""
    for number in range(count):
        start = number * len(curve) // count
        stop = (number + 1) * len(curve) // count
        bars += _bar(curve[start:stop], low, high)
    return bars


def _bar(stretch: Sequence[tuple[int, float]], low: float, high: float) -> str:
    """One bar for the mean of some points, between two values."""
    values = []
    for _, value in stretch:
        values.append(value)
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    mean = total / len(values)
    if math.isnan(mean):
        return _BROKEN
    if high == low:
        return _BARS[0]
    share = (mean - low) / (high - low)
    last = len(_BARS) - 1
    return _BARS[round(share * last)]


def _label_of_run(row: ComparisonRow, run: TrackedRun) -> str:
    """What the line of a run is called: as its row, and by its seed where that has several."""
    if len(row.runs) == 1:
        return row.label
    seed = run.params.get(SEED)
    return f"{row.label}, seed {seed}"
