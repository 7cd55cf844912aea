"""The comparison as one HTML file that needs nothing else: no network, no other file."""

import math
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from orchestrator.comparison import chart
from orchestrator.comparison.chart import Dot, Line
from orchestrator.comparison.compare import Comparison, Row, Run, shown
from orchestrator.comparison.measure import MEASURES, Measure
from orchestrator.comparison.table import cell

_COSTS = ("peak_memory_bytes", "train_s")
_SHOWN_TAGS = ("mlflow.source.git.commit", "mlflow.user", "fleetune.version", "fleetune.run_dir")


def write(comparison: Comparison, path: Path) -> None:
    """Write the report."""
    path.write_text(page(comparison), encoding="utf-8")


def page(comparison: Comparison) -> str:
    """The report as HTML."""
    body = "\n".join(
        [
            _head(comparison),
            _constants(comparison),
            _curves(comparison),
            _fronts(comparison),
            _results(comparison),
            _details(comparison),
        ]
    )
    plot = f'x="{chart.LEFT}" y="{chart.TOP}" width="{chart.WIDE}" height="{chart.HEIGHT - chart.TOP - chart.BOTTOM}"'
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"Fleetune: {comparison.title}"), plot=plot, body=body)


def _head(comparison: Comparison) -> str:
    when = time.strftime("%Y-%m-%d %H:%M")
    counted = f"{_plural(len(comparison.runs), 'run')} in {_plural(len(comparison.rows), 'configuration')}"
    about = escape(f"{counted}, from {comparison.uri}")
    return f'<h1>{escape(comparison.title)}</h1><p class="soft">{about}, {when}</p>{_praise(comparison)}'


def _praise(comparison: Comparison) -> str:
    """Which row is best; how many are as good."""
    best, quality = comparison.rows[0], comparison.quality
    found = best.figure(quality.key)
    if best.status != "FINISHED" or not found or not math.isfinite(found.mean):
        return ""
    figures = [row.figure(quality.key) for row in comparison.rows[1:] if row.status == "FINISHED"]
    equal = sum(figure is not None and figure.mean == found.mean for figure in figures)
    shared = f" and {_plural(equal, 'other')}" if equal else ""
    value, label = (f"<strong>{escape(text)}</strong>" for text in (cell(best, quality), best.label))
    return f'<p class="best">Best {quality.title}: {value} by {label}{shared}</p>'


def _constants(comparison: Comparison) -> str:
    title = "The same for all runs" if comparison.columns else "Configuration"
    return f"<h2>{title}</h2>{_list(comparison.constant)}"


def _curves(comparison: Comparison) -> str:
    titles = {"loss": "Training loss", "eval_loss": "Evaluation loss", "eval_exact_match": "Exact match"}
    known = {key: title for key, title in titles.items() if any(run.curves.get(key) for run in comparison.runs)}
    widths = [chart.WIDE if len(known) % 2 else chart.WIDTH, *[chart.WIDTH] * len(known)]
    drawn = "".join(_lines(comparison, *item, width) for item, width in zip(known.items(), widths, strict=False))
    return f'<h2>Curves</h2><div class="charts">{drawn}</div>{_legend(comparison)}' if drawn else ""


def _lines(comparison: Comparison, key: str, title: str, width: int) -> str:
    lines = [
        Line(row.label if len(row.runs) == 1 else f"{row.label}, seed {run.params.get('train.seed')}", group, curve)
        for group, row in enumerate(comparison.rows)
        for run in row.runs
        if (curve := run.curves.get(key))
    ]
    show = "{:.0%}".format if key == "eval_exact_match" else "{:.4g}".format
    measure = next(measure for measure in MEASURES if measure.key == key)
    return chart.line_chart(title, lines, "step", show, measure.bounds, width)


def _legend(comparison: Comparison) -> str:
    items = (
        f'<li data-of="{group}">{chart.swatch(group)}{escape(row.label)}</li>'
        for group, row in enumerate(comparison.rows)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _fronts(comparison: Comparison) -> str:
    """Quality against each cost, of the runs that finished."""
    known = {measure.key: measure for measure in comparison.measures}
    plots = "".join(_front(comparison, known[key]) for key in _COSTS if key in known)
    note = '<p class="soft">Filled points are on the Pareto front: no other run is as good for less.</p>'
    return f'<h2>Quality against cost</h2>{note}<div class="charts">{plots}</div>' if plots else ""


def _front(comparison: Comparison, cost: Measure) -> str:
    quality = comparison.quality
    points = [
        (group, row.label, x.mean, y.mean)
        for group, row in enumerate(comparison.rows)
        if row.status == "FINISHED"
        and (x := row.figure(cost.key))
        and (y := row.figure(quality.key))
        and math.isfinite(y.mean)
    ]
    if not points:
        return ""
    front = chart.pareto([(x, y) for _, _, x, y in points], bool(quality.more_is_better))
    dots = [Dot(label, group, x, y, best) for (group, label, x, y), best in zip(points, front, strict=True)]
    title = f"{quality.title.capitalize()} against {cost.title}"
    unit = _unit(cost, max(dot.x for dot in dots))
    return chart.scatter(title, dots, cost.title, unit, (cost.show, quality.show), quality.bounds)


def _unit(cost: Measure, largest: float) -> float:
    """What the ticks of a cost are round numbers of."""
    units = (2.0**30, 2.0**20) if cost.key == "peak_memory_bytes" else (3600.0, 60.0)
    return next((unit for unit in units if largest > 2 * unit), 1.0)


def _results(comparison: Comparison) -> str:
    heads = [f"<th>{escape(comparison.heading(key))}</th>" for key in comparison.columns]
    heads += [f'<th class="n">{measure.title}</th>' for measure in comparison.measures]
    best = {measure.key: _best(comparison, measure) for measure in comparison.measures}
    rows = "".join(_result(comparison, row, best) for row in comparison.rows)
    head = f"<tr><th>run</th><th>status</th>{''.join(heads)}<th>seeds</th></tr>"
    return f'<h2>Differences and results</h2><div class="wide"><table>{head}{rows}</table></div>'


def _result(comparison: Comparison, row: Row, best: Mapping[str, Row | None]) -> str:
    cells = [f"<td>{escape(shown(key, row.differences[key]) or '-')}</td>" for key in comparison.columns]
    cells += [
        f'<td class="n{" top" if best[measure.key] is row else ""}">{escape(cell(row, measure))}</td>'
        for measure in comparison.measures
    ]
    cells.append(f"<td>{escape(', '.join(row.seeds))}</td>")
    return f"<tr><td>{escape(row.label)}</td><td>{_status(row.status)}</td>{''.join(cells)}</tr>"


def _best(comparison: Comparison, measure: Measure) -> Row | None:
    """The best finished row in a measure; None where nothing is to be compared."""
    found = {
        index: figure.mean
        for index, row in enumerate(comparison.rows)
        if row.status == "FINISHED" and (figure := row.figure(measure.key)) and math.isfinite(figure.mean)
    }
    if len(found) < 2 or measure.more_is_better is None:
        return None
    return comparison.rows[(max if measure.more_is_better else min)(found, key=lambda index: found[index])]


def _details(comparison: Comparison) -> str:
    runs = "".join(
        f"<details><summary>{chart.swatch(group)} {escape(row.label)} · {_status(row.status)}</summary>"
        f"{''.join(_run(comparison, run) for run in row.runs)}</details>"
        for group, row in enumerate(comparison.rows)
    )
    return f"<h2>Each run</h2>{runs}"


def _run(comparison: Comparison, run: Run) -> str:
    facts = {"MLflow run": run.mlflow_run_id, "seed": run.params.get("train.seed", "?")}
    facts |= {key: run.params[key] for key in comparison.columns if key in run.params}
    facts |= {m.title: m.show(run.figures[m.key]) for m in comparison.measures if m.key in run.figures}
    shown = (key for key in sorted(run.tags) if key in _SHOWN_TAGS or key.startswith("fleetune.env."))
    facts |= {key.removeprefix("fleetune.").removeprefix("mlflow."): run.tags[key] for key in shown}
    return f"<h3>{escape(run.run_id)}</h3>{_list(facts)}"


def _list(facts: Mapping[str, str]) -> str:
    entries = (f"<div><dt>{escape(key)}</dt><dd>{escape(shown(key, text))}</dd></div>" for key, text in facts.items())
    return f"<dl>{''.join(entries)}</dl>"


def _status(status: str) -> str:
    known = status.lower() if status.isalpha() else ""
    return f'<span class="status {known}">{escape(status.lower())}</span>'


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
