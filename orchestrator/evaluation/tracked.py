"""Evaluations in MLflow: for each adapter of a run and each task one child run of that run's own MLflow run.

It is found by a tag, the digest of what was evaluated, so that the same evaluation is one child run however often it
is asked for.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.evaluation.adapters import AdapterSource
from orchestrator.evaluation.report import EvaluatedTask, EvaluationReport, TaskResult
from orchestrator.tracking.store import PARENT_TAG, address, client, counting_run
from orchestrator.tracking.trouble import diagnose, is_of_mlflow
from runfolder.files import Damaged
from runfolder.variables import public

EVALUATION_TAG = "fleetune.evaluation"
_LONGEST_PARAM = 500  # characters
_NOT_YET = "its run has no MLflow run yet; fleetune compare delivers it"


def track(report: EvaluationReport, sources: Sequence[AdapterSource]) -> EvaluationReport:
    """Bring an evaluation to MLflow; gives it with the ids of the child runs, and why some are not there."""
    by_label = {source.label: source for source in sources}
    reasons: dict[str, str] = {}  # by label
    tasks = []
    for task in report.tasks:
        results = []
        for result in task.results:
            source = by_label.get(result.label)
            if source is not None and result is not task.base:
                result = _tracked(task, result, source, reasons)
            results.append(result)
        tasks.append(replace(task, results=results))
    warnings = list(report.warnings)
    for label, reason in reasons.items():
        warnings.append(f"{label} is not in MLflow: {reason}")
    return replace(report, tasks=tasks, warnings=warnings)


def _tracked(task: EvaluatedTask, result: TaskResult, source: AdapterSource, reasons: dict[str, str]) -> TaskResult:
    """A result with its child run in MLflow; where it has none, why is noted. What no run left needs none."""
    if source.run_dir is None:
        return result
    uri = ""
    try:
        parent = counting_run(source.run_dir)
        if parent is None:
            reasons[result.label] = _NOT_YET
            return result
        uri = address(source.run_dir)
        child = _child_run(client(uri), parent["mlflow_run_id"], task, result)
        return replace(result, mlflow_run_id=child)
    except (Damaged, InputError) as error:
        reasons[result.label] = str(error)
    except Exception as error:
        is_of_system = isinstance(error, OSError)
        if not is_of_system and not is_of_mlflow(error):
            raise
        trouble = diagnose(error, uri)
        reasons[result.label] = f"{public(uri)}: {trouble.reason}"
    return result


def _child_run(mlflow: Any, parent_id: str, task: EvaluatedTask, result: TaskResult) -> str:
    """The id of the child run of a result, which is made, whole or not at all, where there is none."""
    parent = mlflow.get_run(parent_id)
    info = parent.info
    experiment = info.experiment_id
    digest = _evaluation_digest(task, result)
    query = f"tags.`{EVALUATION_TAG}` = '{digest}' and tags.`{PARENT_TAG}` = '{parent_id}'"
    there = mlflow.search_runs([experiment], query)
    if there:
        first = there[0]
        info = first.info
        return str(info.run_id)
    tags = {
        PARENT_TAG: parent_id,
        EVALUATION_TAG: digest,
        "fleetune.evaluated_run": result.run_id or "",
        "fleetune.name": task.name,
    }
    child = mlflow.create_run(experiment, tags=tags, run_name=f"evaluate {task.name}")
    info = child.info
    run_id = str(info.run_id)
    try:
        _describe_child(mlflow, run_id, task, result)
    except BaseException:
        mlflow.delete_run(run_id)
        raise
    return run_id


def _describe_child(mlflow: Any, run_id: str, task: EvaluatedTask, result: TaskResult) -> None:
    """Log what was evaluated, what came of it, and all answers."""
    from mlflow.entities import Metric, Param

    run = mlflow.get_run(run_id)
    info = run.info
    time_ms = info.start_time
    metrics = []
    for key, value in _logged_metrics(task, result):
        metric = Metric(key, value, time_ms, 0)
        metrics.append(metric)
    params = []
    for key, text in _logged_params(task, result):
        param = Param(key, text)
        params.append(param)
    mlflow.log_batch(run_id, metrics=metrics, params=params)
    mlflow.log_artifact(run_id, result.file)
    mlflow.set_terminated(run_id)


def _evaluation_digest(task: EvaluatedTask, result: TaskResult) -> str:
    """What decides on a child run: task, rows, adapter, where its answers are of, and what all of them are worth."""
    keys = []
    for row in task.prepared.rows:
        keys.append(row.key)
    path = Path(result.file)
    answers_of = path.parts[-3]
    facts: list[Any] = [task.prepared.key, keys, result.digest, answers_of, result.right, task.base.right]
    if result.wins is not None:
        facts.append(result.wins.to_json())
    text = json.dumps(facts)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:32]


def _logged_metrics(task: EvaluatedTask, result: TaskResult) -> Iterator[tuple[str, float]]:
    """The measures of a result, its differences to the base, and the ends of their intervals."""
    estimates = task.estimates(result)
    for measure, more in task.to_base(result).items():
        estimates[f"{measure}_to_base"] = more
    if result.wins is not None:
        estimates["win_rate"] = result.wins.rate
        yield "flipped", float(result.wins.flipped)
    for name, estimate in estimates.items():
        for end, number in estimate.to_json().items():
            key = name
            if end != "value":
                key = f"{name}_{end}"
            if number is not None:
                yield key, number
    if result.change is not None:
        yield "logit_change", result.change


def _logged_params(task: EvaluatedTask, result: TaskResult) -> Iterator[tuple[str, str]]:
    """What was evaluated, as params."""
    rows = len(result.scores)
    data = task.prepared.task.data
    yield "task", task.name
    yield "kind", task.prepared.task.kind
    yield "data", data[-_LONGEST_PARAM:]
    yield "rows", str(rows)
    yield "adapter_digest", result.digest
    if result.wins is not None:
        yield "judge", result.wins.judge[-_LONGEST_PARAM:]
        yield "judged_against", result.wins.against
