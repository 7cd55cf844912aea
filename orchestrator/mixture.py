"""What a combination of adapters scores beside its parents, by one evaluation of all of them and of the base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError

if TYPE_CHECKING:
    from orchestrator.comparison.estimates import Estimate
    from orchestrator.evaluation.process import EvaluationProgress
    from orchestrator.evaluation.report import EvaluatedTask, EvaluationReport, TaskResult


@dataclass(frozen=True)
class MixtureTasks:
    """What parents and mixture are asked, as `fleetune evaluate` takes it."""

    tasks: tuple[str, ...] = ()
    base: str | None = None
    limit: int | None = None


def check_asked(asked: MixtureTasks, parents: Sequence[str]) -> None:
    """Raise InputError for what could not be evaluated, before anything is combined."""
    if not asked.tasks:
        for option, value in (("--base", asked.base), ("--limit", asked.limit)):
            if value is not None:
                raise InputError(f"{option}: found without --tasks; allowed: with it")
        return
    from orchestrator.evaluation.adapters import resolve_adapters
    from orchestrator.evaluation.evaluate import TRAIN, base_named, require_packages
    from orchestrator.evaluation.harness import harness_name, require_harness
    from orchestrator.evaluation.task import read_tasks

    of_harness = [name for name in map(harness_name, asked.tasks) if name is not None]
    read_tasks([Path(task) for task in asked.tasks if harness_name(task) is None])
    require_harness(of_harness)
    require_packages(TRAIN)
    base_named(asked.base, resolve_adapters(parents))


def evaluate_mixture(
    asked: MixtureTasks, parents: Sequence[str], mixture: Path, progress: "EvaluationProgress"
) -> dict[str, Any]:
    """What base, parents and mixture score in each task, and how the mixture compares with each of its parents.

    Answers of before are not asked again. Raises InputError.
    """
    from orchestrator.evaluation.evaluate import evaluate

    adapters = [*parents, str(mixture)]
    report = evaluate(adapters, asked.tasks, base=asked.base, limit=asked.limit, progress=progress)
    return mixture_json(report)


def mixture_json(report: "EvaluationReport") -> dict[str, Any]:
    """An evaluation whose last adapter is the mixture of the others, as plain data."""
    plain = report.to_json()
    for task, task_json in zip(report.tasks, plain["tasks"], strict=True):
        _, *parents, mixture = task.results
        against = []
        for parent in parents:
            compared = against_parent(task, mixture, parent)
            against.append(compared)
        task_json["mixture"] = mixture.label
        task_json["against_parents"] = against
    return plain


def against_parent(task: "EvaluatedTask", mixture: "TaskResult", parent: "TaskResult") -> dict[str, Any]:
    """What the mixture has more than a parent, and of how many rows that the parent has right it is right too."""
    from orchestrator.evaluation.report import difference

    differences = {}
    for measure in task.measures:
        more = difference(measure, mixture, parent)
        differences[measure] = more.to_json()
    both = zip(parent.right, mixture.right, strict=True)
    kept = sum(of_parent and of_mixture for of_parent, of_mixture in both)
    return {"parent": parent.label, "difference": differences, "right": sum(parent.right), "kept": kept}


def task_lines(task: dict[str, Any]) -> list[str]:
    """A task for people: what base, parents and mixture score, and what the mixture lost of each parent."""
    from orchestrator.evaluation.table import TITLES, difference_text, estimate_text

    results = task["results"]
    measure = next(iter(results[0]["measures"]))
    rows = task["rows"]
    name = task["task"]
    lines = [f"{name}, {rows} rows, {TITLES[measure]}:"]
    for result in results:
        label = result["label"]
        text = estimate_text(measure, estimate_in(result["measures"][measure]))
        lines.append(f"  {label}: {text}")
    mixture = task["mixture"]
    for against in task["against_parents"]:
        text = difference_text(measure, estimate_in(against["difference"][measure]))
        parent = against["parent"]
        kept = against["kept"]
        right = against["right"]
        lines.append(f"  {mixture} to {parent}: {text}; it keeps {kept} of the {right} that {parent} has right")
    return lines


def estimate_in(plain: dict[str, Any]) -> "Estimate":
    """An estimate of plain data, in which ends that are not finite are null."""
    from orchestrator.comparison.estimates import Estimate

    low = plain["low"]
    high = plain["high"]
    if low is None:
        low = -math.inf
    if high is None:
        high = math.inf
    return Estimate(plain["value"], low, high)
