"""`fleetune combine`: several adapters as one, with a report of what each parent scored and what the mixture does."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.mixture import MixtureTasks, check_asked, evaluate_mixture, task_lines

if TYPE_CHECKING:
    from methods.parts.combination import Combination, Recipe
    from orchestrator.evaluation.process import EvaluationProgress

NOTHING_ASKED = MixtureTasks()
REPORT_FILE = "combination.json"


@dataclass(frozen=True)
class Ingredient:
    """A parent of a combination."""

    name: str  # as the command line has it: a folder, or a run
    folder: Path
    weight: float
    scores: dict[str, float]  # of its run's best evaluation, if it is a run that has one


def combine_adapters(
    out: Path,
    parents: list[str],
    how: str,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    asked: MixtureTasks = NOTHING_ASKED,
    progress: "EvaluationProgress" = lambda _done, _total: None,
) -> dict[str, Any]:
    """Write the combination of PARENT:WEIGHT into a new folder, and give its report; raises InputError.

    With tasks, parents and combination are evaluated on them.
    """
    if out.exists():
        raise InputError(f"--out: found {out}, which is there already; allowed: a new folder")
    if len(parents) < 2:
        raise InputError(f"found {len(parents)} adapters; allowed: two or more, each as ADAPTER:WEIGHT")
    ingredients = read_ingredients(parents)
    names = [ingredient.name for ingredient in ingredients]
    check_asked(asked, names)
    from methods.parts.combination import Recipe, combine
    from methods.parts.lora_folder import NotCombined, read_lora_folder, write_lora_folder

    recipe = Recipe(how, rank, density, seed)
    try:
        adapters = [read_lora_folder(ingredient.folder) for ingredient in ingredients]
        weights = [ingredient.weight for ingredient in ingredients]
        combination = combine(adapters, weights, recipe)
    except NotCombined as error:
        raise InputError(str(error)) from error
    write_lora_folder(combination.adapter, out)
    report = report_of(ingredients, recipe, combination)
    write_combination_report(report, out)
    if asked.tasks:
        report["evaluation"] = evaluate_mixture(asked, names, out, progress)
        write_combination_report(report, out)
    return report


def write_combination_report(report: dict[str, Any], out: Path) -> None:
    """Leave a report beside the combination that it is of."""
    text = json.dumps(report, indent=2)
    file = out / REPORT_FILE
    file.write_text(f"{text}\n")


def read_ingredients(texts: list[str]) -> list[Ingredient]:
    """The parents in ADAPTER:WEIGHT, brought here where they are runs of elsewhere; raises InputError."""
    names = []
    weights = []
    for text in texts:
        name, weight = weighted_name(text)
        names.append(name)
        weights.append(weight)
    from orchestrator.evaluation.adapters import resolve_adapters

    ingredients = []
    for name, weight, source in zip(names, weights, resolve_adapters(names), strict=True):
        scores = {} if Path(name).is_dir() else _scores(name)
        ingredients.append(Ingredient(name, source.folder, weight, scores))
    return ingredients


def weighted_name(text: str) -> tuple[str, float]:
    """The adapter and the weight in ADAPTER:WEIGHT; raises InputError."""
    name, sign, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not sign or not name or not math.isfinite(weight):
        raise InputError(f"found {text!r}; allowed: ADAPTER:WEIGHT, like runs/a/output:0.7")
    return name, weight


def _scores(name: str) -> dict[str, float]:
    """The figures of a run's best evaluation, if it has one."""
    from orchestrator.status import status

    run = status(name)
    if run.figures is None or run.figures.best_evaluation is None:
        return {}
    scores: dict[str, float] = {}
    for measure, value in run.figures.best_evaluation.items():
        if measure.startswith("eval_"):
            scores[measure] = value
    return scores


def report_of(ingredients: list[Ingredient], recipe: "Recipe", combination: "Combination") -> dict[str, Any]:
    """What is known of a combination, as plain data."""
    parents: list[dict[str, Any]] = []
    for ingredient in ingredients:
        parent = {"adapter": ingredient.name, "weight": ingredient.weight, "scores": ingredient.scores}
        parents.append(parent)
    ranks = []
    for factors in combination.adapter.updates.values():
        ranks.append(factors.rank)
    return {
        "how": recipe.how,
        "rank": max(ranks),
        "density": recipe.density if recipe.how in ("ties", "dare") else None,
        "seed": recipe.seed if recipe.how == "dare" else None,
        "parents": parents,
        "distance_from_sum": round(combination.distance, 6),
        "cancelled": round(combination.cancelled, 4),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report for people."""
    lines: list[str] = []
    for parent in report["parents"]:
        scores = []
        for name, value in parent["scores"].items():
            scores.append(f"{name} {value:.4g}")
        known = ", ".join(scores) or "no evaluation is known"
        weight = parent["weight"]
        adapter = parent["adapter"]
        lines.append(f"{weight:g} x {adapter}: {known}")
    how = report["how"]
    rank = report["rank"]
    distance = report["distance_from_sum"]
    cancelled = report["cancelled"]
    lines.append(f"combined as {how}, rank {rank}; {distance:.1%} away from the weighted sum")
    lines.append(f"{cancelled:.1%} of what the parents change takes back what another one does")
    evaluation = report.get("evaluation")
    if evaluation is None:
        lines.append("parents interfere, so what they scored says little of the mixture: evaluate it (--tasks)")
        return lines
    for task in evaluation["tasks"]:
        lines += task_lines(task)
    return lines
