"""`fleetune combine`: several adapters as one, with a report of what each parent scored and what the mixture does."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError

if TYPE_CHECKING:
    from methods.parts.combination import Combination, Recipe
    from orchestrator.status import Status

REPORT_FILE = "combination.json"


@dataclass(frozen=True)
class Ingredient:
    """A parent of a combination."""

    name: str  # as the command line has it: a folder, or a run
    folder: Path
    weight: float
    scores: dict[str, float]  # of its run's best evaluation, if it is a run that has one


def combine_adapters(
    out: Path, parents: list[str], how: str, rank: int | None = None, density: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """Write the combination of PARENT:WEIGHT into a new folder, and give its report; raises InputError."""
    if out.exists():
        raise InputError(f"--out: found {out}, which is there already; allowed: a new folder")
    if len(parents) < 2:
        raise InputError(f"found {len(parents)} adapters; allowed: two or more, each as ADAPTER:WEIGHT")
    ingredients = [read_ingredient(text) for text in parents]
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
    (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return report


def read_ingredient(text: str) -> Ingredient:
    """A parent in ADAPTER:WEIGHT; raises InputError."""
    name, sign, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError as error:
        raise InputError(f"found {text!r}; allowed: ADAPTER:WEIGHT, like runs/a/output:0.7") from error
    if not sign or not name or weight != weight or abs(weight) == float("inf"):
        raise InputError(f"found {text!r}; allowed: ADAPTER:WEIGHT, like runs/a/output:0.7")
    folder = Path(name)
    if folder.is_dir():
        return Ingredient(name, folder, weight, {})
    from orchestrator.status import status

    run = status(name)
    if run.output_dir is None:
        raise InputError(f"found the run {run.run_id}, which has no output: it is {run.state}")
    return Ingredient(name, Path(run.output_dir), weight, _scores(run))


def _scores(run: "Status") -> dict[str, float]:
    """The figures of a run's best evaluation, if it has one."""
    if run.figures is None or run.figures.best_evaluation is None:
        return {}
    scores: dict[str, float] = {}
    for name, value in run.figures.best_evaluation.items():
        if name.startswith("eval_"):
            scores[name] = value
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
    lines.append("parents interfere, so what they scored says little of the mixture: evaluate it before you use it")
    return lines
