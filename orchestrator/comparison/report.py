"""The comparison as one HTML file that needs nothing else: no network, no other file."""

import math
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from orchestrator.comparison import axis, plots, svg
from orchestrator.comparison.cells import cell, difference_heading, gap_text, rank_text
from orchestrator.comparison.compare import QUALITIES, Comparison, display_value
from orchestrator.comparison.disagreement import answers_side_by_side
from orchestrator.comparison.downloads import downloads
from orchestrator.comparison.failures import failures
from orchestrator.comparison.forest import forest
from orchestrator.comparison.group import SEED
from orchestrator.comparison.measure import MEASURES, Measure
from orchestrator.comparison.method_text import methods_text
from orchestrator.comparison.rates import rate_chart
from orchestrator.comparison.row import ComparisonRow
from orchestrator.comparison.run import TrackedRun

_SHOWN_TAGS = ("mlflow.source.git.commit", "mlflow.user", "fleetune.version", "fleetune.run_dir")
_ENVIRONMENT = "fleetune.env."  # tags that begin so are shown too

BestRows = dict[str, ComparisonRow | None]  # by the key of a measure
_HEADER = '<h1>{title}</h1><p class="soft">{about}, {now}</p>{verdict}{barrier}{best}'
_VERDICT = '<p class="verdict">{sentence}</p>'
_BARRIER = '<p class="barrier">{sentence}</p>'
_SEEN = '<p class="best">{extreme} {measure}: {value} by {label}{others}. {caution}</p>'
_CAUTION = "That does not make it the best: without several seeds, or results by row, no difference has an interval."
_RESULTS = '<h2>Results</h2><div class="wide"><table>{rows}</table></div>'
_MEASURE_CELL = '<td class="{style}">{value}</td>'
_DETAILS = "<details><summary>{swatch} {label} · {state}</summary>{runs}</details>"
_FACT = "<div><dt>{name}</dt><dd>{value}</dd></div>"
_STATE_SPAN = '<span class="state {style}">{text}</span>'
# The rectangle that lines are clipped to.
_PLOT_AREA = 'x="{x}" y="{y}" width="{width}" height="{height}"'


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison into a file."""
    path.write_text(page(comparison), encoding="utf-8")


def page(comparison: Comparison) -> str:
    """The report of a comparison as HTML."""
    sections = [
        _head(comparison),
        _results(comparison),
        _forests(comparison),
        plots.fronts(comparison),
        rate_chart(comparison),
        plots.curves(comparison),
        answers_side_by_side(comparison),
        failures(comparison),
        methods_text(comparison),
        _constants(comparison),
        _details(comparison),
        downloads(comparison),
    ]
    body = "\n".join(sections)
    title = escape(f"Fleetune: {comparison.title}")
    file = Path(__file__).with_name("report.html")
    template = Template(file.read_text(encoding="utf-8"))
    plot = _plot_area()
    return template.substitute(title=title, style=style_sheet(), plot=plot, body=body)


def style_sheet() -> str:
    """The style of all pages that are one file."""
    file = Path(__file__).with_name("report.css")
    return file.read_text(encoding="utf-8")


def _plot_area() -> str:
    """The attributes of the rectangle that lines are clipped to."""
    margins = axis.TOP + axis.BOTTOM
    height = axis.HEIGHT - margins
    place = {"x": axis.LEFT, "y": axis.TOP}
    size = {"width": axis.FULL_WIDTH, "height": height}
    return _PLOT_AREA.format(**place, **size)


def _head(comparison: Comparison) -> str:
    """Title, what is compared, and the best."""
    title = escape(comparison.title)
    now = time.strftime("%Y-%m-%d %H:%M")
    runs = _plural(len(comparison.runs), "run")
    configurations = _plural(len(comparison.rows), "configuration")
    about = f"{runs} in {configurations}, from {comparison.uri}"
    about = escape(about)
    best = _best_of_all(comparison)
    verdict = _sentence(_VERDICT, comparison.verdict)
    barrier = _sentence(_BARRIER, comparison.barrier)
    said = {"verdict": verdict, "barrier": barrier, "best": best}
    return _HEADER.format(title=title, about=about, now=now, **said)


def _sentence(template: str, sentence: str | None) -> str:
    """A sentence as HTML, beginning with a capital; empty where there is none."""
    if not sentence:
        return ""
    capital = sentence[:1].upper()
    text = capital + sentence[1:]
    return template.format(sentence=escape(text))


def _forests(comparison: Comparison) -> str:
    """The differences to the reference, of each ranking that has some."""
    drawn = "".join(map(forest, comparison.rankings))
    if not drawn:
        return ""
    return f"<h2>Differences to the reference</h2>{drawn}"


def _best_of_all(comparison: Comparison) -> str:
    """Which row has the highest or lowest quality, with a caution; empty where the verdict says more."""
    if comparison.shows_ranks:
        return ""
    best = comparison.rows[0]
    quality = comparison.quality
    mean = _finite_mean(best, quality)
    if mean is None:
        return ""
    equals = 0
    for row in comparison.rows[1:]:
        other_mean = _finite_mean(row, quality)
        if other_mean == mean:
            equals += 1
    others = ""
    if equals:
        number = _plural(equals, "other")
        others = f" and {number}"
    extreme = "Lowest"
    if quality.more_is_better:
        extreme = "Highest"
    caution = ""
    if len(comparison.rows) > 1:
        caution = _CAUTION
    text = cell(best, quality)
    value = escape(text)
    label = escape(best.label)
    said = {"value": value, "label": label, "others": others, "caution": caution}
    return _SEEN.format(extreme=extreme, measure=quality.title, **said)


def _finite_mean(row: ComparisonRow, measure: Measure) -> float | None:
    """A measure of a row; None where it did not finish, has none, or one that is not finite."""
    metric = row.metric(measure.key)
    if row.state != "succeeded" or metric is None:
        return None
    mean = metric.mean
    return mean if math.isfinite(mean) else None


def _constants(comparison: Comparison) -> str:
    title = "The same for all runs" if comparison.columns else "Configuration"
    facts = _list(comparison.constant)
    return f"<h2>{title}</h2>{facts}"


def _results(comparison: Comparison) -> str:
    """The table of all rows: in what they differ, and what came of them."""
    heads = "<th>run</th><th>state</th>"
    if comparison.shows_ranks:
        heading = difference_heading(comparison)
        heads += f'<th class="n">{escape(heading)}</th>'
    best: BestRows = {}
    for measure in comparison.measures:
        heads += f'<th class="n">{measure.title}</th>'
        best[measure.key] = _best(comparison, measure)
    for param in comparison.columns:
        heading = comparison.heading(param)
        heads += f"<th>{escape(heading)}</th>"
    heads += "<th>seeds</th>"
    rows = f"<tr>{heads}</tr>"
    for row in comparison.rows:
        rows += _result(comparison, row, best)
    return _RESULTS.format(rows=rows)


def _result(comparison: Comparison, row: ComparisonRow, best: BestRows) -> str:
    """A row of the table; a value that is the best of all is marked."""
    label = escape(rank_text(comparison, row) + row.label)
    state = _state(row.state)
    cells = f"<td>{label}</td><td>{state}</td>"
    if comparison.shows_ranks:
        difference, _, ends = gap_text(comparison, row).partition("\n")
        if ends:
            difference = f"{difference} ({ends})"
        cells += f'<td class="n">{escape(difference)}</td>'
    for measure in comparison.measures:
        style = "n"
        if _is_marked(comparison, row, measure, best):
            style = "n top"
        text = cell(row, measure)
        value = escape(text)
        cells += _MEASURE_CELL.format(style=style, value=value)
    for param in comparison.columns:
        value = display_value(param, row.differences[param]) or "-"
        cells += f"<td>{escape(value)}</td>"
    seeds = ", ".join(row.seeds)
    cells += f"<td>{escape(seeds)}</td>"
    return f"<tr>{cells}</tr>"


def _is_marked(comparison: Comparison, row: ComparisonRow, measure: Measure, best: BestRows) -> bool:
    """Whether a value stands out: of costs the best, of what rows are ranked by all that share the first rank.

    Of other qualities none: no interval says which of them differ.
    """
    if measure not in MEASURES[:QUALITIES]:
        return best[measure.key] is row
    place = comparison.place_of(row)
    if place is None:
        return False
    quality = comparison.quality
    if measure.key != quality.key:
        return False
    ranking, ranked = place
    is_first = ranked.rank == 1
    return ranking.says_something and is_first


def _best(comparison: Comparison, measure: Measure) -> ComparisonRow | None:
    """The best finished row in a measure; None where nothing is to be compared."""
    if measure.more_is_better is None:
        return None
    means = {}
    for index, row in enumerate(comparison.rows):
        mean = _finite_mean(row, measure)
        if mean is not None:
            means[index] = mean
    if len(means) < 2:
        return None
    choose = max if measure.more_is_better else min
    index = choose(means, key=means.__getitem__)
    return comparison.rows[index]


def _details(comparison: Comparison) -> str:
    """Each row with the facts of its runs, folded."""
    rows = ""
    for group, row in enumerate(comparison.rows):
        swatch = svg.swatch(group)
        label = escape(row.label)
        state = _state(row.state)
        runs = ""
        for run in row.runs:
            runs += _run(comparison, run)
        rows += _DETAILS.format(swatch=swatch, label=label, state=state, runs=runs)
    return f"<h2>Each run</h2>{rows}"


def _run(comparison: Comparison, run: TrackedRun) -> str:
    """The facts of a run: where it is in MLflow, its params that differ, its measures, where it ran."""
    seed = run.params.get(SEED, "?")
    facts = {"MLflow run": run.mlflow_run_id, "seed": seed}
    for param in comparison.columns:
        if param in run.params:
            facts[param] = run.params[param]
    for measure in comparison.measures:
        metric = run.metrics.get(measure.key)
        if metric is not None:
            facts[measure.title] = measure.show(metric)
    for tag, value in sorted(run.tags.items()):
        is_environment = tag.startswith(_ENVIRONMENT)
        if is_environment or tag in _SHOWN_TAGS:
            name = tag.removeprefix("fleetune.").removeprefix("mlflow.")
            facts[name] = value
    title = escape(run.run_id)
    definitions = _list(facts)
    return f"<h3>{title}</h3>{definitions}"


def _list(facts: Mapping[str, str]) -> str:
    """Facts by their names, as a list of definitions."""
    entries = ""
    for name, text in facts.items():
        value = escape(display_value(name, text))
        name = escape(name)
        entries += _FACT.format(name=name, value=value)
    return f"<dl>{entries}</dl>"


def _state(state: str) -> str:
    style = state if state.isalpha() else ""
    text = escape(state)
    return _STATE_SPAN.format(style=style, text=text)


def _plural(number: int, noun: str) -> str:
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}s"
