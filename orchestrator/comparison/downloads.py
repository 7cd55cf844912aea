"""The figures of a comparison as files that a page holds: JSON with all of it, CSV with a line for each row."""

import base64
import csv
import io
import json
import math

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.row import ComparisonRow

_LINK = '<a download="{name}" href="data:{kind};base64,{content}">{name}</a>'
_RANKED = ("rank", "gain", "gain_low", "gain_high", "finding")
CsvLine = dict[str, object]  # of a line, by their column


def downloads(comparison: Comparison) -> str:
    """Links to both files, which need neither a network nor a script."""
    text = json.dumps(comparison.to_json())
    as_json = _link("comparison.json", "application/json", text)
    as_csv = _link("comparison.csv", "text/csv", csv_text(comparison))
    return f"<h2>The figures</h2><p>{as_json} · {as_csv}</p>"


def csv_text(comparison: Comparison) -> str:
    """A line for each row: its rank, its gain over the reference, each measure with its spread, and its settings."""
    lines = []
    columns: dict[str, None] = {}
    for row in comparison.rows:
        cells = _line_of_row(comparison, row)
        lines.append(cells)
        names = dict.fromkeys(cells)
        columns.update(names)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _line_of_row(comparison: Comparison, row: ComparisonRow) -> CsvLine:
    """What stands in the line of a row."""
    seeds = " ".join(row.seeds)
    cells: CsvLine = {"label": row.label, "state": row.state, "seeds": seeds}
    place = comparison.place_of(row)
    if place is not None:
        ranking, ranked = place
        gain, low, high = ranking.gain(ranked)
        values = (ranked.rank, gain, low, high, ranked.finding)
        for name, value in zip(_RANKED, values, strict=True):
            cells[name] = _or_empty(value)
    for measure in comparison.measures:
        metric = row.metric(measure.key)
        if metric is not None:
            cells[measure.key] = metric.mean
            cells[f"{measure.key}_std"] = metric.std
    cells |= row.differences
    return cells


def _or_empty(value: object) -> object:
    """A value; empty for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    return value


def _link(name: str, kind: str, text: str) -> str:
    """A link by which a browser saves a text as a file."""
    plain = text.encode()
    encoded = base64.b64encode(plain)
    content = encoded.decode()
    return _LINK.format(name=name, kind=kind, content=content)
