"""What a ranking says, in one sentence, also where it says no or cannot tell."""

import math

from orchestrator.comparison.outcomes import EXACT_MATCH
from orchestrator.comparison.power import rows_needed, seeds_needed, smallest_difference
from orchestrator.comparison.ranking import Ranked, Ranking


def conclusion(ranking: Ranking) -> str:
    """What a ranking says, in one sentence."""
    name = ranking.reference.label
    others = [each for each in ranking.ranked if each.finding != "reference"]
    if not others:
        return f"{name} has nothing to be compared with."
    better = [each for each in others if each.finding == "better"]
    if better:
        best = max(better, key=lambda each: ranking.gain(each)[1])
        text = f"{best.contender.label} beats {name} by {_range(ranking, best)}"
        return _with_scope(text, ranking, best)
    as_good = [each for each in others if each.finding == "as good"]
    if as_good:
        cheapest = min(as_good, key=lambda each: each.contender.cost or math.inf)
        text = f"{cheapest.contender.label} is as good as {name} within {shown_difference(ranking, ranking.margin)}"
        own_cost, other_cost = cheapest.contender.cost, ranking.reference.cost
        if own_cost and other_cost and own_cost < other_cost:
            text += f", and takes {own_cost / other_cost:.0%} of its time"
        return _with_scope(text, ranking, cheapest)
    if all(each.finding == "worse" for each in others):
        closest = max(others, key=lambda each: ranking.gain(each)[2])
        return _with_scope(
            f"nothing beats {name}: {closest.contender.label} is {_behind(ranking, closest)}", ranking, closest
        )
    unclear = [each for each in others if each.finding == "cannot tell apart"]
    return _undecided(ranking, unclear[0])


def _undecided(ranking: Ranking, closest: Ranked) -> str:
    """That one cannot be told from the reference, which difference would be seen, and what would show a small one."""
    text = f"cannot tell {closest.contender.label} apart from {ranking.reference.label}"
    spread = closest.difference.spread
    if spread is None:
        if not math.isfinite(closest.difference.error):
            return f"{text}: each has one seed, and no results by row; run 3 seeds or more."
        return _with_scope(f"{text}: it differs by {_range(ranking, closest)}", ranking, closest)
    seeds = closest.difference.seeds
    rows = closest.difference.rows
    smallest = smallest_difference(spread, seeds, rows, ranking.level)
    unseen = shown_difference(ranking, smallest)
    text += f": differences under {unseen} are invisible with {rows} rows and {seeds} seeds"
    margin = ranking.margin
    wanted = f"to see {shown_difference(ranking, margin)}"
    more_seeds = seeds_needed(spread, margin, rows, ranking.level)
    if more_seeds is not None:
        return f"{text}; {wanted}: {more_seeds} seeds."
    more_rows = rows_needed(spread, margin, seeds, ranking.level)
    if more_rows is not None:
        return f"{text}; {wanted}: {more_rows} rows (more seeds alone would not do)."
    return f"{text}; {wanted}, more seeds and more rows are needed."


def _with_scope(text: str, ranking: Ranking, ranked: Ranked) -> str:
    """A sentence with what its interval speaks for."""
    contrast = ranked.difference
    basis = f"{contrast.seeds} seeds"
    if contrast.scope == "seeds and rows":
        basis = f"{contrast.rows} rows and {contrast.seeds} seeds"
    if contrast.scope == "rows":
        basis = f"{contrast.rows} rows of one seed, which says nothing of others"
    count = len(ranking.ranked) - 1
    together = "" if count == 1 else f", {count} comparisons at once"
    return f"{text} (95 %{together}; {basis})."


def _range(ranking: Ranking, ranked: Ranked) -> str:
    """The ends of the interval of a gain."""
    _, low, high = ranking.gain(ranked)
    return f"{shown_difference(ranking, low)} to {shown_difference(ranking, high)}"


def _behind(ranking: Ranking, ranked: Ranked) -> str:
    """By how much a contender is worse."""
    _, low, high = ranking.gain(ranked)
    return f"{shown_difference(ranking, -high)} to {shown_difference(ranking, -low)} worse"


def shown_difference(ranking: Ranking, value: float) -> str:
    """A difference as people read it: of shares in points."""
    if ranking.measure.key == EXACT_MATCH:
        return f"{100 * value:.1f} points"
    return f"{value:.4f}"
