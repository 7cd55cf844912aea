"""What a ranking says, in one sentence, also where it says no or cannot tell."""

import math

from orchestrator.comparison.power import rows_needed, seeds_needed, smallest_difference
from orchestrator.comparison.ranking import Judgement, Ranked, Ranking

_NO_OTHERS = "{reference} has nothing to be compared with."
_BEATS = "{label} beats {reference} in {measure} by {low} to {high}"
_TIES = ", and so do {labels}, which cannot be told apart from it"
_CLEARLY_CHEAPER = 0.9  # times the cost of the reference: times of equal runs differ too
_MOST_NAMED = 3  # contenders in one sentence
_AS_GOOD = "{label} is as good as {reference} in {measure} within {margin}"
_CHEAPER = ", and takes {share:.0%} of its time"
_NOTHING_BEATS = "nothing beats {reference} in {measure}: {label} is {less} to {more} worse"
_UNCLEAR = "cannot tell {label} apart from {reference} in {measure}"
_DIFFERS = "{text}: it differs by {low} to {high}"
_ONE_SEED = "{text}: each has one seed, and no results by row; run 3 seeds or more."
_SEEDS_ALIKE = "{text}: their seeds are all alike, and there are no results by row; whether others are is not known."
_INVISIBLE = "{text}: differences under {smallest} are invisible with {rows} rows and {seeds} seeds; to see {margin}"
_MORE_SEEDS = "{text}: {seeds} seeds."
_MORE_ROWS = "{text}: {rows} rows (more seeds alone would not do)."
_MORE_OF_BOTH = "{text}, more seeds and more rows are needed."
_SCOPE = "{text} (95 %{together}; {basis})."


def conclusion(ranking: Ranking) -> str:
    """What a ranking says, in one sentence."""
    reference = ranking.reference.label
    if len(ranking.ranked) < 2:
        return _NO_OTHERS.format(reference=reference)
    better = _with_judgement(ranking, "better")
    if better:
        return _beats(ranking, better)
    as_good = _with_judgement(ranking, "as good")
    if as_good:
        return _is_as_good(ranking, as_good)
    unclear = _with_judgement(ranking, "cannot tell apart")
    if unclear:
        return _undecided(ranking, unclear[0])
    worse = _with_judgement(ranking, "worse")
    return _nothing_beats(ranking, worse)


def _with_judgement(ranking: Ranking, judgement: Judgement) -> list[Ranked]:
    """The contenders of which the intervals say this."""
    found = []
    for ranked in ranking.ranked:
        if ranked.finding == judgement:
            found.append(ranked)
    return found


def _beats(ranking: Ranking, better: list[Ranked]) -> str:
    """That the one which is better by the most for sure beats the reference."""
    best = _surest(ranking, better)
    _, low, high = ranking.gain(best)
    text = _BEATS.format(
        label=best.contender.label,
        reference=ranking.reference.label,
        measure=ranking.measure.title,
        low=shown_difference(ranking, low),
        high=shown_difference(ranking, high),
    )
    equals = _not_worse(best, better)
    if equals:
        labels = _few_named(equals)
        text += _TIES.format(labels=labels)
    return _with_scope(text, ranking, best)


def _not_worse(best: Ranked, better: list[Ranked]) -> list[Ranked]:
    """Those of some contenders that share the rank of the one that is best for sure."""
    equals = []
    for ranked in better:
        if ranked is not best and ranked.rank == best.rank:
            equals.append(ranked)
    return equals


def _few_named(contenders: list[Ranked]) -> str:
    """The names of a few contenders, and how many there are beside these."""
    names = []
    for ranked in contenders[:_MOST_NAMED]:
        label = ranked.contender.label
        names.append(label)
    left = len(contenders) - len(names)
    if left:
        names.append(f"{left} more")
    return ", ".join(names)


def _is_as_good(ranking: Ranking, as_good: list[Ranked]) -> str:
    """That the cheapest of those that are as good is so, and what it costs."""
    cheapest = min(as_good, key=_cost)
    least = _cost(cheapest)
    text = _AS_GOOD.format(
        label=cheapest.contender.label,
        reference=ranking.reference.label,
        measure=ranking.measure.title,
        margin=shown_difference(ranking, ranking.margin),
    )
    usual = ranking.reference.cost
    if usual is not None and least < usual:
        share = least / usual
        text += _CHEAPER.format(share=share)
    return _with_scope(text, ranking, cheapest)


def recommended(ranking: Ranking) -> Ranked:
    """The contender to take: the surest of those that beat the reference, else the cheapest that is as good.

    The reference, where none beats it, and none that is as good is clearly cheaper.
    """
    better = _with_judgement(ranking, "better")
    if better:
        return _surest(ranking, better)
    reference, *_ = _with_judgement(ranking, "reference")
    cheapest = reference
    least = _CLEARLY_CHEAPER * _cost(reference)
    for ranked in _with_judgement(ranking, "as good"):
        cost = _cost(ranked)
        if cost < least:
            cheapest = ranked
            least = cost
    return cheapest


def _surest(ranking: Ranking, better: list[Ranked]) -> Ranked:
    """The one that is better by the most for sure."""

    def least_gain(ranked: Ranked) -> float:
        _, low, _ = ranking.gain(ranked)
        return low

    return max(better, key=least_gain)


def _cost(ranked: Ranked) -> float:
    """The seconds that a contender trains; infinite where that is not known."""
    cost = ranked.contender.cost
    return math.inf if cost is None else cost


def _nothing_beats(ranking: Ranking, worse: list[Ranked]) -> str:
    """That all are worse than the reference, and by how much the first of them is."""
    closest = worse[0]
    _, low, high = ranking.gain(closest)
    text = _NOTHING_BEATS.format(
        label=closest.contender.label,
        reference=ranking.reference.label,
        measure=ranking.measure.title,
        less=shown_difference(ranking, -high),
        more=shown_difference(ranking, -low),
    )
    return _with_scope(text, ranking, closest)


def _undecided(ranking: Ranking, closest: Ranked) -> str:
    """That one cannot be told from the reference, which difference would be seen, and what would show a small one."""
    difference = closest.difference
    text = _UNCLEAR.format(
        label=closest.contender.label,
        reference=ranking.reference.label,
        measure=ranking.measure.title,
    )
    spread = difference.spread
    if not math.isfinite(difference.error):
        reason = _ONE_SEED if difference.seeds == 1 else _SEEDS_ALIKE
        return reason.format(text=text)
    if spread is None:
        _, low, high = ranking.gain(closest)
        shown_low = shown_difference(ranking, low)
        shown_high = shown_difference(ranking, high)
        text = _DIFFERS.format(text=text, low=shown_low, high=shown_high)
        return _with_scope(text, ranking, closest)
    seeds = difference.seeds
    rows = difference.rows
    smallest = smallest_difference(spread, seeds, rows, ranking.level)
    text = _INVISIBLE.format(
        text=text,
        smallest=shown_difference(ranking, smallest),
        rows=rows,
        seeds=seeds,
        margin=shown_difference(ranking, ranking.margin),
    )
    more_seeds = seeds_needed(spread, ranking.margin, rows, ranking.level)
    if more_seeds is not None:
        return _MORE_SEEDS.format(text=text, seeds=more_seeds)
    more_rows = rows_needed(spread, ranking.margin, seeds, ranking.level)
    if more_rows is not None:
        return _MORE_ROWS.format(text=text, rows=more_rows)
    return _MORE_OF_BOTH.format(text=text)


def _with_scope(text: str, ranking: Ranking, ranked: Ranked) -> str:
    """A sentence with what its interval speaks for."""
    contrast = ranked.difference
    seeds = contrast.seeds
    rows = contrast.rows
    basis = f"{seeds} seeds"
    if contrast.scope == "seeds and rows":
        basis = f"{rows} rows and {seeds} seeds"
    elif contrast.scope == "rows":
        basis = f"{rows} rows of one seed, which says nothing of others"
    comparisons = len(ranking.ranked) - 1
    together = ""
    if comparisons > 1:
        together = f", {comparisons} comparisons at once"
    return _SCOPE.format(text=text, together=together, basis=basis)


def shown_difference(ranking: Ranking, value: float) -> str:
    """A difference as people read it: of shares in points."""
    if ranking.measure.is_share_of_rows:
        points = 100 * value
        return f"{points:.1f} points"
    return f"{value:.4f}"
