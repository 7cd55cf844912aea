"""The runs of an experiment, as a comparison reads them from MLflow."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from operator import attrgetter
from typing import Any

from orchestrator.comparison.measure import CURVE_KINDS
from orchestrator.errors import InputError
from orchestrator.tracking.facts import NOT_TRAINING, state_in_mlflow
from orchestrator.tracking.password import TRACKING_URI
from orchestrator.tracking.store import RUN_ID_TAG
from runfolder.variables import public

CurvePoint = tuple[int, float]  # step and value
Curve = tuple[CurvePoint, ...]
Curves = dict[str, Curve]
Input = tuple[str, str]  # the param that names a base or a file, and its digest
_KEYS_OF_CURVES = tuple(kind.key for kind in CURVE_KINDS)
_OF_TEST_ROWS = ("eval_test_exact_match", "eval_test_accuracy", "eval_test_loss")  # at the end alone
_LAST_COUNTS = (
    *_OF_TEST_ROWS,
    "loss",
    "eval_loss",
    "eval_exact_match",
    "eval_accuracy",
)  # curves of which the last value is a measure
_RETAINED = "eval_retain_loss"  # before the first step, and after the last one
CURVES = (*_KEYS_OF_CURVES, *_OF_TEST_ROWS, _RETAINED, "tokens_per_second", "peak_memory_bytes")
_METRIC_STEP = attrgetter("step")  # of a point that MLflow has
_METRIC_STEP_AND_VALUE = attrgetter("step", "value")
_TRAINED = "fleetune.plan.trained"
_DIGESTS = {
    "base.model": "base_digest",
    "data.train": "data.train_digest",
    "data.eval": "data.eval_digest",
    "data.retain": "data.retain_digest",
}


@dataclass(frozen=True)
class TrackedRun:
    """One MLflow run. `state` is that of `fleetune status`; `metrics` has each measure that the run reported."""

    run_id: str
    mlflow_run_id: str
    state: str
    params: dict[str, str]
    tags: dict[str, str]
    curves: Curves
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        """The name of the job that was run."""
        return self.params.get("name", self.run_id)


def load_runs(mlflow: Any, experiment: str | None, uri: str) -> list[TrackedRun]:
    """The runs of an experiment (None: of all); raises InputError where there is no such experiment or no run."""
    ids = _experiment_ids(mlflow, experiment, uri)
    query = f"tags.`{RUN_ID_TAG}` LIKE '%'"
    order = ["start_time"]
    tracked: list[Any] = []
    token: str | None = ""
    while token is not None:
        page = mlflow.search_runs(ids, query, order_by=order, page_token=token or None)
        tracked += page
        token = page.token or None
    tracked = [run for run in tracked if NOT_TRAINING not in run.data.tags]
    if not tracked:
        name = experiment or "any"
        raise InputError(f"experiment {name!r} at {uri} has no runs of Fleetune")
    runs = []
    for run in tracked:
        runs.append(_read_run(mlflow, run))
    return list(same_inputs(runs))


def same_inputs(runs: Sequence[TrackedRun]) -> Iterator[TrackedRun]:
    """The runs with one path for each base and file: the same one lies elsewhere on another machine."""
    paths: dict[Input, str] = {}  # the shortest
    for run in runs:
        for known_input in _inputs_of(run):
            param, _ = known_input
            path = run.params[param]
            shortest = paths.get(known_input, path)
            paths[known_input] = min(shortest, path, key=len)
    for run in runs:
        params = dict(run.params)
        for known_input in _inputs_of(run):
            param, _ = known_input
            params[param] = paths[known_input]
        yield replace(run, params=params)


def _inputs_of(run: TrackedRun) -> Iterator[Input]:
    """The base and the files of a run whose digests it says."""
    params = run.params
    for param, digest in _DIGESTS.items():
        if param in params and digest in params:
            yield param, params[digest]


def _experiment_ids(mlflow: Any, experiment: str | None, uri: str) -> list[str]:
    """MLflow's id of an experiment (None: of every one)."""
    ids = {}
    for known in mlflow.search_experiments():
        ids[known.name] = known.experiment_id
    if experiment is None:
        return list(ids.values())
    if experiment not in ids:
        names = get_close_matches(experiment, ids, n=3, cutoff=0.4)
        if not names:
            names = sorted(ids)[:10]
        existing = ", ".join(names)
        raise InputError(f"experiment {experiment!r} is not at {uri}; there are: {existing}")
    return [ids[experiment]]


def _read_run(mlflow: Any, run: Any) -> TrackedRun:
    """A run with its curves and measures; `run` is what a search gave, which lacks the curves."""
    mlflow_run_id = run.info.run_id
    curves: Curves = {}
    timestamps: list[float] = []
    for key in CURVES:
        if key not in run.data.metrics:
            continue
        points = mlflow.get_metric_history(mlflow_run_id, key)
        points = sorted(points, key=_METRIC_STEP)
        curves[key] = tuple(map(_METRIC_STEP_AND_VALUE, points))
        if key == "loss":
            timestamps = []
            for point in points:
                timestamps.append(point.timestamp / 1000)
    metrics = _metrics_of_curves(curves, timestamps)
    tags = dict(run.data.tags)
    trained = tags.get(_TRAINED)
    if trained:
        metrics["trained"] = float(trained)
    params = dict(run.data.params)
    uri = params.get(TRACKING_URI)
    if uri:  # an earlier version may have told MLflow the password
        params[TRACKING_URI] = public(uri)
    run_id = tags[RUN_ID_TAG]
    state = state_in_mlflow(run.info.status)
    return TrackedRun(run_id, mlflow_run_id, state, params, tags, curves, metrics)


def _metrics_of_curves(curves: Curves, timestamps: list[float]) -> dict[str, float]:
    """The measures of one run, by their keys; `timestamps` are the seconds at which steps were reported."""
    metrics = {}
    for key in _LAST_COUNTS:
        if key in curves:
            last_point = curves[key][-1]
            _, metrics[key] = last_point
    losses = _curve_values(curves, "loss")
    losses = list(filter(math.isfinite, losses))
    if losses:
        metrics["best_loss"] = min(losses)
    retained = _curve_values(curves, _RETAINED)
    if len(retained) > 1:
        metrics["forgetting"] = retained[-1] - retained[0]
    memory = _curve_values(curves, "peak_memory_bytes")
    if memory:
        metrics["peak_memory_bytes"] = max(memory)
    speeds = _curve_values(curves, "tokens_per_second")
    if speeds:
        metrics["tokens_per_second"] = statistics.median(speeds)
    if len(timestamps) > 1:
        metrics["train_s"] = _undisturbed_time(timestamps)
    return metrics


def _curve_values(curves: Curves, key: str) -> list[float]:
    """The values of a curve without their steps; none where there is no such curve."""
    values = []
    for _, value in curves.get(key, ()):
        values.append(value)
    return values


def _undisturbed_time(timestamps: Sequence[float]) -> float:
    """Seconds that the run would have taken undisturbed: steps x median time of a step."""
    gaps = []
    for earlier, later in pairwise(timestamps):
        gaps.append(later - earlier)
    median = max(0.0, statistics.median(gaps))
    return median * len(timestamps)
