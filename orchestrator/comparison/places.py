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
    """What somebody wants of rankings: the label or method of the reference, and one ranking whatever differs."""

    reference: str | None = None
    together: bool = False
    read: ReadResults = read_results


USUAL = RankingWish()


def rankings_of(
    rows: Sequence[ComparisonRow], quality: Measure, wish: RankingWish
) -> tuple[tuple[Ranking, ...], str | None]:
    """The rankings of rows, which come best first, and what is to be said of the barrier between them.

    Raises InputError where the reference is none of the rows.
    """
    eligible = [number for number, row in enumerate(rows) if _is_ranked(row, quality)]
    if wish.reference is not None and _row_named(rows, eligible, wish.reference) is None:
        labels = ", ".join(rows[number].label for number in eligible)
        raise InputError(f"--reference: found {wish.reference!r}; allowed: a method, or one of {labels}")
    groups = [rows[number].runs for number in eligible]
    said = barrier(groups, wish.together)
    parts = [list(range(len(groups)))]
    if not wish.together:
        parts = strata(groups)
    rankings = []
    for part in filter(None, parts):
        numbers = [eligible[place] for place in part]
        rankings.append(_ranking(rows, numbers, quality, wish))
    return tuple(rankings), said


def _ranking(rows: Sequence[ComparisonRow], numbers: list[int], quality: Measure, wish: RankingWish) -> Ranking:
    """The ranking of some rows."""
    groups = [rows[number].runs for number in numbers]
    outcomes = outcomes_of(groups, quality.key, wish.read)
    contenders = []
    for number, outcome in zip(numbers, outcomes, strict=True):
        row = rows[number]
        time = row.metric("train_s")
        cost = time.mean if time else None
        contenders.append(Contender(number, row.label, outcome, cost))
    reference = _row_named(rows, numbers, wish.reference or _USUAL_REFERENCE)
    if reference is None:
        reference = numbers[0]
    return rank(contenders, quality, reference)


def _row_named(rows: Sequence[ComparisonRow], numbers: Sequence[int], name: str) -> int | None:
    """The first row of this label, else the best one of this method."""
    for number in numbers:
        if rows[number].label == name:
            return number
    for number in numbers:
        if rows[number].runs[0].params.get("method.kind") == name:
            return number
    return None


def _is_ranked(row: ComparisonRow, quality: Measure) -> bool:
    """Whether a row succeeded, and all of its runs have a finite quality."""
    if row.state != "succeeded":
        return False
    values = [run.metrics.get(quality.key, math.nan) for run in row.runs]
    return all(map(math.isfinite, values))
