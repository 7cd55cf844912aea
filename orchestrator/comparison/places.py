"""The rankings of a comparison's rows: those that succeeded, by the kind of their runs, against a reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.comparison.measure import Measure
from orchestrator.comparison.outcomes import ReadResults, outcomes_of, read_results
from orchestrator.comparison.ranking import Contender, Ranking, rank
from orchestrator.comparison.row import ComparisonRow
from orchestrator.comparison.strata import barrier, strata
from orchestrator.errors import InputError

_USUAL_REFERENCE = "lora"  # what users ask whether they can beat


@dataclass(frozen=True)
class RankingWish:
    """What somebody wants of rankings: the reference by label, run id or method, one for all, a measure."""

    reference: str | None = None
    together: bool = False
    measure: str | None = None
    read: ReadResults = read_results


USUAL = RankingWish()


def rankings_of(
    rows: Sequence[ComparisonRow], quality: Measure, wish: RankingWish
) -> tuple[tuple[Ranking, ...], str | None]:
    """The rankings of rows, which come best first, and what is to be said of the barrier between them.

    Raises InputError where the reference is none of the rows.
    """
    eligible = []
    for number, row in enumerate(rows):
        if _is_ranked(row, quality):
            eligible.append(number)
    wanted = wish.reference
    if wanted is not None and _row_named(rows, eligible, wanted) is None:
        labels = [rows[number].label for number in eligible]
        allowed = ", ".join(labels)
        raise InputError(f"--reference: found {wanted!r}; allowed: a method, a run id, or one of {allowed}")
    groups = [rows[number].runs for number in eligible]
    said = barrier(groups, wish.together)
    places = list(range(len(groups)))
    parts = [places]
    if not wish.together:
        parts = strata(groups)
    rankings = []
    for part in filter(None, parts):
        numbers = []
        for place in part:
            numbers.append(eligible[place])
        ranking = _ranking(rows, numbers, quality, wish)
        rankings.append(ranking)
    return tuple(rankings), said


def _ranking(
    rows: Sequence[ComparisonRow],
    numbers: list[int],
    quality: Measure,
    wish: RankingWish,
) -> Ranking:
    """The ranking of some rows."""
    groups = []
    for number in numbers:
        row = rows[number]
        groups.append(row.runs)
    outcomes = outcomes_of(groups, quality.key, wish.read)
    contenders = []
    for number, outcome in zip(numbers, outcomes, strict=True):
        row = rows[number]
        time = row.metric("train_s")
        cost = None
        if time is not None:
            cost = time.mean
        contender = Contender(number, row.label, outcome, cost)
        contenders.append(contender)
    name = wish.reference or _USUAL_REFERENCE
    reference = _row_named(rows, numbers, name)
    if reference is None:
        reference = numbers[0]
    return rank(contenders, quality, reference)


def _row_named(rows: Sequence[ComparisonRow], numbers: Sequence[int], name: str) -> int | None:
    """The first row of this label or with a run of this id, else the best one of this method."""
    for number in numbers:
        row = rows[number]
        run_ids = [run.run_id for run in row.runs]
        if row.label == name or name in run_ids:
            return number
    for number in numbers:
        row = rows[number]
        first = row.runs[0]
        if first.params.get("method.kind") == name:
            return number
    return None


def _is_ranked(row: ComparisonRow, quality: Measure) -> bool:
    """Whether a row succeeded, and all of its runs have a finite quality."""
    if row.state != "succeeded":
        return False
    values = []
    for run in row.runs:
        value = run.metrics.get(quality.key, math.nan)
        values.append(value)
    return all(map(math.isfinite, values))
