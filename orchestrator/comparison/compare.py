"""Runs side by side, as MLflow has them: what differs in their configuration, and what came of it."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from orchestrator.comparison.measure import MEASURES, Measure
from orchestrator.errors import InputError
from orchestrator.tracking.delivery import all_held_up, deliver_late
from orchestrator.tracking.password import TRACKING_URI, public, without_password
from orchestrator.tracking.store import RUN_ID, client, resolve, sqlite_file
from orchestrator.tracking.trouble import diagnose, is_of_mlflow

Curve = tuple[tuple[int, float], ...]
CURVES = ("loss", "eval_loss", "eval_exact_match", "tokens_per_second", "peak_memory_bytes")
SEED = "train.seed"
_NOT_COMPARED = {SEED, "name"}


def shown(param: str, value: str) -> str:
    """A param's value as it is shown; of a digest the first characters are enough."""
    return value[:12] if param.endswith("_digest") else value


@dataclass(frozen=True)
class Run:
    """One MLflow run. `figures` has a value for each measure that the run reported."""

    run_id: str
    mlflow_run_id: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    curves: dict[str, Curve]
    figures: dict[str, float]

    @property
    def name(self) -> str:
        """The job's name."""
        return self.params.get("name", self.run_id)


@dataclass(frozen=True)
class Figure:
    """A measure over the runs of a row; std is the sample's, 0 for one run."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed."""

    label: str
    status: str
    differences: dict[str, str]
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[str]:
        """The seeds, in numeric order."""
        return sorted((run.params.get(SEED, "?") for run in self.runs), key=lambda seed: (len(seed), seed))

    def figure(self, key: str) -> Figure | None:
        """Mean and spread of a measure; None where no run has it."""
        values = [run.figures[key] for run in self.runs if key in run.figures]
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
        return Figure(math.fsum(values) / len(values), spread, len(values))


@dataclass(frozen=True)
class Comparison:
    """Rows, best first; `constant` holds what all runs share, `columns` the params in which they differ.

    `undelivered`: run id -> why MLflow has not got all of it; such runs are not here, or not with all that they did.
    """

    title: str
    uri: str
    constant: dict[str, str]
    columns: list[str]
    rows: list[Row]
    undelivered: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for row in self.rows for run in row.runs]

    @property
    def measures(self) -> list[Measure]:
        """The measures that some run has."""
        return [measure for measure in MEASURES if any(row.figure(measure.key) for row in self.rows)]

    @property
    def quality(self) -> Measure:
        """What the rows are judged by: exact match, else evaluation loss, else training loss."""
        return _quality(self.runs)

    def heading(self, param: str) -> str:
        """The short name of a param: its last part, where that is clear."""
        short = param.removesuffix(".kind").rpartition(".")[2]
        return short if sum(short == p.removesuffix(".kind").rpartition(".")[2] for p in self.columns) == 1 else param

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data; a value that is not finite is null."""
        return {
            "experiment": self.title,
            "uri": self.uri,
            "constant": self.constant,
            "columns": self.columns,
            "rows": [_row_json(row) for row in self.rows],
            "undelivered": self.undelivered,
        }


def compare(experiment: str | None, uri: str | None) -> Comparison:
    """Read the runs of an experiment (None: of all) from MLflow, which first gets what an outage held up.

    Raises InputError for an experiment that is not there and where MLflow refuses to answer, ConnectionError where it
    cannot be reached.
    """
    deliver_late()
    missing = {run_id: str(trouble) for run_id, trouble in all_held_up().items()}
    uri = resolve(uri)
    shown_uri, file = without_password(uri, uri), sqlite_file(uri)
    if file and not file.exists():
        raise InputError(f"nothing was tracked yet: there is no {file}")
    try:
        runs = _load(client(uri), experiment, shown_uri)
    except InputError as error:
        raise InputError("\n".join([str(error), *(f"{run_id}: {why}" for run_id, why in missing.items())])) from None
    except Exception as error:
        if not isinstance(error, OSError | ImportError) and not is_of_mlflow(error):
            raise
        trouble = diagnose(error, uri)
        if trouble.lasting:
            raise InputError(f"MLflow at {shown_uri}: {trouble.reason}; {trouble.mend}") from error
        raise ConnectionError(f"MLflow at {shown_uri}: {trouble.reason}") from error
    return replace(arrange(runs, experiment or "all experiments", shown_uri), undelivered=missing)


def arrange(runs: list[Run], title: str, uri: str) -> Comparison:
    """Group runs that differ in the seed alone, and sort the groups, best first."""
    keys = sorted({key for run in runs for key in run.params} - _NOT_COMPARED)
    columns = [key for key in keys if len({run.params.get(key) for run in runs}) > 1]
    constant = {key: runs[0].params[key] for key in keys if key not in columns}
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.status, *(run.params.get(key) for key in columns)), []).append(run)
    labels = _labels(list(groups.values()), columns)
    rows = [
        Row(label, group[0].status, {key: group[0].params.get(key, "") for key in columns}, tuple(group))
        for label, group in zip(labels, groups.values(), strict=True)
    ]
    return Comparison(title, uri, constant, columns, sorted(rows, key=_order(_quality(runs))))


def _load(mlflow: Any, experiment: str | None, uri: str) -> list[Run]:
    experiments = {found.name: found.experiment_id for found in mlflow.search_experiments()}
    if experiment is not None and experiment not in experiments:
        near = get_close_matches(experiment, experiments, n=3, cutoff=0.4) or sorted(experiments)[:10]
        raise InputError(f"experiment {experiment!r} is not at {uri}; there are: {', '.join(near)}")
    ids = [experiments[experiment]] if experiment is not None else list(experiments.values())
    found: list[Any] = []
    token: str | None = ""
    while token is not None:
        page = mlflow.search_runs(ids, f"tags.`{RUN_ID}` LIKE '%'", order_by=["start_time"], page_token=token or None)
        found += page
        token = page.token or None
    if not found:
        raise InputError(f"experiment {experiment or 'any'!r} at {uri} has no runs of Fleetune")
    return [_run(mlflow, run) for run in found]


def _run(mlflow: Any, run: Any) -> Run:
    points = {
        key: sorted(mlflow.get_metric_history(run.info.run_id, key), key=lambda metric: metric.step)
        for key in CURVES
        if key in run.data.metrics
    }
    tags: dict[str, str] = dict(run.data.tags)
    curves = {key: tuple((point.step, point.value) for point in found) for key, found in points.items()}
    figures = _figures(curves, [point.timestamp / 1000 for point in points.get("loss", [])])
    if trained := tags.get("fleetune.plan.trained"):
        figures["trained"] = float(trained)
    params = dict(run.data.params)
    if uri := params.get(TRACKING_URI):  # an earlier version may have told MLflow the password
        params[TRACKING_URI] = public(uri)
    return Run(tags[RUN_ID], run.info.run_id, run.info.status, params, tags, curves, figures)


def _figures(curves: dict[str, Curve], times: list[float]) -> dict[str, float]:
    """The measures of one run; its time is that of an undisturbed run: steps x median time of a step."""
    figures = {key: curve[-1][1] for key, curve in curves.items() if key in ("loss", "eval_loss", "eval_exact_match")}
    if losses := [value for _, value in curves.get("loss", ()) if math.isfinite(value)]:
        figures["best_loss"] = min(losses)
    if memory := curves.get("peak_memory_bytes"):
        figures["peak_memory_bytes"] = max(value for _, value in memory)
    if speed := curves.get("tokens_per_second"):
        figures["tokens_per_second"] = statistics.median(value for _, value in speed)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if gaps:
        figures["train_s"] = max(0.0, statistics.median(gaps)) * len(times)
    return figures


def _labels(groups: list[list[Run]], columns: list[str]) -> list[str]:
    """A name for each group: the job's; where several share it, with what differs, else with the run id."""
    names = [" / ".join(sorted({run.name for run in group})) for group in groups]
    full = [
        f"{name} ({', '.join(value for key in columns if (value := group[0].params.get(key)))})" if columns else name
        for name, group in zip(names, groups, strict=True)
    ]
    taken, spelled = Counter(names), Counter(full)
    return [
        name if taken[name] == 1 else long if spelled[long] == 1 and len(long) <= 60 else group[0].run_id
        for name, long, group in zip(names, full, groups, strict=True)
    ]


def _quality(runs: Iterable[Run]) -> Measure:
    reported = {key for run in runs for key in run.figures}
    return next((measure for measure in MEASURES[:2] if measure.key in reported), MEASURES[2])


def _order(quality: Measure) -> Callable[[Row], tuple[bool, bool, float]]:
    def order(row: Row) -> tuple[bool, bool, float]:
        figure = row.figure(quality.key)
        if figure is None or not math.isfinite(figure.mean):
            return row.status != "FINISHED", True, 0.0
        return row.status != "FINISHED", False, -figure.mean if quality.more_is_better else figure.mean

    return order


def _row_json(row: Row) -> dict[str, Any]:
    figures = {measure.key: figure for measure in MEASURES if (figure := row.figure(measure.key))}
    return {
        "label": row.label,
        "status": row.status,
        "n": len(row.runs),
        "seeds": row.seeds,
        "run_ids": [run.run_id for run in row.runs],
        "mlflow_run_ids": [run.mlflow_run_id for run in row.runs],
        "differences": row.differences,
        "figures": {key: {"mean": _finite(f.mean), "std": _finite(f.std), "n": f.n} for key, f in figures.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
