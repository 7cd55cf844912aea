"""Which configurations are better, by intervals: ranks with ties, differences to one reference, and the verdict.

A rank is shared by all that are not shown worse than the best of them. Intervals of differences hold all at once
(Bonferroni), so that among many equal ones none seems better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.comparison.intervals import Contrast, at_once
from orchestrator.comparison.measure import Measure
from orchestrator.comparison.outcomes import QualityByRow

Judgement = Literal["reference", "better", "worse", "as good", "cannot tell apart"]
_MARGIN_OF_SHARE = 0.01  # one point: what differs by no more is as good
_MARGIN_OF_LOSS = 0.01  # of the reference's


@dataclass(frozen=True)
class Contender:
    """A configuration in a ranking: its place among the ranked ones, what it reached, and its cost."""

    number: int
    label: str
    outcome: QualityByRow
    cost: float | None = None


@dataclass(frozen=True)
class Ranked:
    """A contender with its rank, its own mean, and its difference to the reference."""

    contender: Contender
    rank: int
    own: Contrast
    difference: Contrast
    finding: Judgement


@dataclass(frozen=True)
class Ranking:
    """Contenders of one kind of run, the best first; `level` is that of the intervals of differences."""

    measure: Measure
    reference: Contender
    ranked: tuple[Ranked, ...]
    level: float
    margin: float

    @property
    def says_something(self) -> bool:
        """Whether any difference has an interval."""
        for each in self.ranked:
            is_reference = each.finding == "reference"
            if not is_reference and math.isfinite(each.difference.error):
                return True
        return False

    def gain(self, ranked: Ranked) -> tuple[float, float, float]:
        """By how much a contender is better than the reference, and the ends of the interval of that."""
        difference = ranked.difference
        value = difference.value
        low, high = difference.interval(self.level)
        if self.measure.more_is_better:
            return value, low, high
        return -value, -high, -low

    def to_json(self) -> dict[str, Any]:
        """The ranking as plain data; an end that is not finite is null."""
        rows = []
        for each in self.ranked:
            low, high = each.own.interval()
            gain, least, most = self.gain(each)
            rows.append(
                {
                    "label": each.contender.label,
                    "rank": each.rank,
                    "value": each.own.value,
                    "low": _finite_or_none(low),
                    "high": _finite_or_none(high),
                    "gain": gain,
                    "gain_low": _finite_or_none(least),
                    "gain_high": _finite_or_none(most),
                    "finding": each.finding,
                    "seeds": each.own.seeds,
                    "rows": each.own.rows,
                    "scope": each.difference.scope,
                }
            )
        return {
            "measure": self.measure.key,
            "reference": self.reference.label,
            "level": self.level,
            "margin": self.margin,
            "rows": rows,
        }


def rank(contenders: Sequence[Contender], measure: Measure, reference: int) -> Ranking:
    """Rank contenders by a measure, against the one of this number."""
    chosen = next(each for each in contenders if each.number == reference)
    level = at_once(len(contenders) - 1)
    margin = _margin_of_equivalence(measure, chosen)
    found = []
    for contender in contenders:
        own = contender.outcome.alone()
        difference = contender.outcome.less(chosen.outcome)
        finding: Judgement = "reference"
        if contender is not chosen:
            finding = _finding(difference, level, margin, measure)
        found.append(Ranked(contender, 0, own, difference, finding))
    ranking = Ranking(measure, chosen, tuple(found), level, margin)
    best_first = _best_mean_first
    if ranking.says_something:
        best_first = _lower_end_first
    found.sort(key=lambda each: best_first(each, measure))
    ranked = _with_ranks(found, level, measure)
    return replace(ranking, ranked=tuple(ranked))


def _with_ranks(found: list[Ranked], level: float, measure: Measure) -> list[Ranked]:
    """Contenders with their ranks: of those that are left, all that are not shown worse than the first share one."""
    ranked: list[Ranked] = []
    left = found
    while left:
        first = left[0]
        number = len(ranked) + 1
        worse = []
        for each in left:
            difference = each.contender.outcome.less(first.contender.outcome)
            if _finding(difference, level, 0.0, measure) == "worse":
                worse.append(each)
            else:
                ranked.append(replace(each, rank=number))
        left = worse
    return ranked


def _finding(difference: Contrast, level: float, margin: float, measure: Measure) -> Judgement:
    """What the interval of a difference says."""
    low, high = difference.interval(level)
    if not measure.more_is_better:
        low, high = -high, -low
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    is_within = -margin <= low and high <= margin
    if is_within and margin > 0:
        return "as good"
    return "cannot tell apart"


def _lower_end_first(each: Ranked, measure: Measure) -> tuple[float, float]:
    """What contenders are sorted by: the worse end of their own interval, then the mean."""
    low, high = each.own.interval()
    if measure.more_is_better:
        return -low, -each.own.value
    return high, each.own.value


def _best_mean_first(each: Ranked, measure: Measure) -> tuple[float, float]:
    """What contenders are sorted by where no difference has an interval: the mean."""
    value = each.own.value
    if measure.more_is_better:
        value = -value
    return value, 0.0


def _margin_of_equivalence(measure: Measure, reference: Contender) -> float:
    """By how much a contender may differ and be as good as the reference."""
    if measure.is_share_of_rows:
        return _MARGIN_OF_SHARE
    mean = float(reference.outcome.values_SN.mean())
    return _MARGIN_OF_LOSS * abs(mean)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
