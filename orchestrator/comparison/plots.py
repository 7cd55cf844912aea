"""The charts of the report: curves over steps, and quality against each cost."""

import math
from dataclasses import replace
from html import escape

from orchestrator.comparison import axis, chart, svg
from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.intervals import CONFIDENCE
from orchestrator.comparison.measure import CURVE_KINDS, CurveKind, Measure
from orchestrator.comparison.pareto import pareto
from orchestrator.comparison.row import ComparisonRow, Metric
from orchestrator.comparison.scatter import Dot, scatter
from orchestrator.comparison.seed_curves import mean_line
from orchestrator.comparison.student import critical_value

_COSTS = ("peak_memory_bytes", "train_s")
_MEMORY_UNITS = (2.0**30, 2.0**20)  # bytes
_TIME_UNITS = (3600.0, 60.0)  # seconds
_UNIT_BUTTONS = (
    '<p class="units" hidden>x in <button data-unit="step">steps</button> <button data-unit="tokens">tokens</button> '
    '<button data-unit="seconds">worker-seconds</button></p>'
)
_ITEM_WITH_COSTS = '<li data-of="{group}"{costs}>{swatch}{label}</li>'
_WORKERS_TAG = "fleetune.plan.work.workers"
_BAND_NOTE = '<p class="soft">A row with several seeds is a line, their mean, in a band of all of them.</p>'
_FRONT_NOTE = (
    '<p class="soft">Filled points are on the Pareto front of the means: no other row is as good for less. Lines are '
    "intervals of 95 % of a row by itself, those of its cost over seeds; where they overlap, who is on the front may "
    "be chance.</p>"
)


def curves(comparison: Comparison) -> str:
    """A chart for each kind of curve that some run has, and their legend."""
    kinds = []
    for kind in CURVE_KINDS:
        if has_curve(comparison, kind):
            kinds.append(kind)
    width = axis.HALF_WIDTH
    if len(kinds) % 2:  # the first has a row for itself
        width = axis.FULL_WIDTH
    charts = ""
    for kind in kinds:
        charts += _curve_chart(comparison, kind, width)
        width = axis.HALF_WIDTH
    if not charts:
        return ""
    legend = _legend(comparison)
    return f'<h2>Curves</h2>{_UNIT_BUTTONS}<div class="charts">{charts}</div>{legend}{_BAND_NOTE}'


def has_curve(comparison: Comparison, kind: CurveKind) -> bool:
    """Whether some run has a curve of a kind."""
    run_curves = []
    for run in comparison.runs:
        run_curves.append(run.curves.get(kind.key))
    return any(run_curves)


def _curve_chart(comparison: Comparison, kind: CurveKind, width: int) -> str:
    """The curves of one kind, of all runs that have one."""
    lines = []
    for group, row in enumerate(comparison.rows):
        curves_of_row = []
        for run in row.runs:
            curve = run.curves.get(kind.key)
            if curve:
                curves_of_row.append(curve)
        if curves_of_row:
            lines.append(mean_line(row.label, group, curves_of_row))
    return chart.line_chart(kind.title, lines, "step", kind.show, kind.bounds, width)


def _legend(comparison: Comparison) -> str:
    """The colour and dashes of each row; the report's script highlights its lines, and reads what a step costs."""
    items = ""
    for group, row in enumerate(comparison.rows):
        swatch = svg.swatch(group)
        label = escape(row.label)
        costs = ""
        for unit, cost in step_costs(row).items():
            costs += f' data-{unit}="{cost:.8g}"'
        items += _ITEM_WITH_COSTS.format(group=group, costs=costs, swatch=swatch, label=label)
    return f'<ul class="legend costs">{items}</ul>'


def step_costs(row: ComparisonRow) -> dict[str, float]:
    """What a step of a row costs on average over its runs: tokens, and seconds of workers, where all runs say it."""
    tokens = []
    seconds = []
    for run in row.runs:
        losses = run.curves.get("loss")
        batch = run.params.get("train.batch_tokens")
        workers = run.tags.get(_WORKERS_TAG)
        if batch:
            tokens.append(float(batch))
        if workers and losses and "train_s" in run.metrics:
            of_workers = run.metrics["train_s"] * float(workers)
            seconds.append(of_workers / len(losses))
    costs = {}
    for unit, values in (("tokens", tokens), ("seconds", seconds)):
        if len(values) == len(row.runs):
            costs[unit] = math.fsum(values) / len(values)
    return costs


def fronts(comparison: Comparison) -> str:
    """Quality against each cost, of the runs that finished."""
    charts = ""
    for measure in comparison.measures:
        if measure.key in _COSTS:
            charts += _front_chart(comparison, measure)
    if not charts:
        return ""
    return f'<h2>Quality against cost</h2>{_FRONT_NOTE}<div class="charts">{charts}</div>'


def _front_chart(comparison: Comparison, cost: Measure) -> str:
    """The rows as points of quality against a cost."""
    quality = comparison.quality
    dots = []
    for group, row in enumerate(comparison.rows):
        x = _metric_if_finished(row, cost)
        y = _metric_if_finished(row, quality)
        if x is None or y is None:
            continue
        if math.isfinite(y.mean):
            low, high = _interval(comparison, row)
            left, right = cost_interval(x)
            dot = Dot(row.label, group, x.mean, y.mean, False, low, high, left, right)
            dots.append(dot)
    if not dots:
        return ""
    dots = _with_front(dots, bool(quality.more_is_better))
    subject = quality.title.capitalize()
    title = f"{subject} against {cost.title}"
    costs = [dot.x for dot in dots]
    largest = max(costs)
    unit = _tick_unit(cost, largest)
    shows = (cost.show, quality.show)
    return scatter(title, dots, cost.title, unit, shows, quality.bounds)


def _interval(comparison: Comparison, row: ComparisonRow) -> tuple[float | None, float | None]:
    """The ends of the interval of a row's quality; None where it has none."""
    place = comparison.place_of(row)
    if place is None:
        return None, None
    _, ranked = place
    low, high = ranked.own.interval()
    is_known = math.isfinite(low) and math.isfinite(high)
    if not is_known:
        return None, None
    return low, high


def cost_interval(cost: Metric) -> tuple[float | None, float | None]:
    """The ends of the interval of a mean cost over seeds, no lower than zero; None where it does not vary."""
    if cost.n < 2 or not cost.std:
        return None, None
    error = cost.std / math.sqrt(cost.n)
    errors = critical_value(CONFIDENCE, cost.n - 1)
    half = errors * error
    low = cost.mean - half
    high = cost.mean + half
    return max(0.0, low), high


def _metric_if_finished(row: ComparisonRow, measure: Measure) -> Metric | None:
    if row.state != "succeeded":
        return None
    return row.metric(measure.key)


def _with_front(dots: list[Dot], more_is_better: bool) -> list[Dot]:
    """The dots, with those on the Pareto front marked."""
    points = []
    for dot in dots:
        points.append((dot.x, dot.y))
    on_front = pareto(points, more_is_better)
    marked = []
    for dot, front in zip(dots, on_front, strict=True):
        marked.append(replace(dot, front=front))
    return marked


def _tick_unit(cost: Measure, largest: float) -> float:
    """What the ticks of a cost are round numbers of."""
    units = _TIME_UNITS
    if cost.key == "peak_memory_bytes":
        units = _MEMORY_UNITS
    for unit in units:
        if largest > 2 * unit:
            return unit
    return 1.0
