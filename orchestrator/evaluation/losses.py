"""Adapters that lose more in a task than they may: `may_lose` in the task's file."""

from collections.abc import Iterator

from orchestrator.comparison.estimates import Estimate
from orchestrator.evaluation.report import EvaluatedTask, TaskResult

_EVEN = 0.5  # the win rate of answers that are as good as others
_LOSES = (
    "task {task}: {label} loses {lost:.1f} points ({low:.1f} to {high:.1f}) to {other}; may_lose allows {allowed:g}"
)


def too_much_lost(task: EvaluatedTask) -> list[str]:
    """Of each adapter that lost more than it may, by how much, and to whom."""
    allowed = task.prepared.task.may_lose
    if allowed is None:
        return []
    texts = []
    for result in task.results:
        if result is task.base:
            continue
        for other, lost in _losses(task, result):
            if lost.value <= allowed:
                continue
            text = _LOSES.format(
                task=task.name,
                label=result.label,
                lost=lost.value,
                low=lost.low,
                high=lost.high,
                other=other,
                allowed=allowed,
            )
            texts.append(text)
    return texts


def _losses(task: EvaluatedTask, result: TaskResult) -> Iterator[tuple[str, Estimate]]:
    """The points that an adapter lost, by whom to: in right answers to the base, before a judge to an opponent."""
    measure = task.measures[0]
    gains = task.to_base(result)
    yield task.base.label, _points_below(0.0, gains[measure])
    wins = result.wins
    if wins is None:
        return
    opponent = f"{wins.against} before {wins.judge}"
    yield opponent, _points_below(_EVEN, wins.rate)


def _points_below(level: float, share: Estimate) -> Estimate:
    """By how many points a share is below a level."""
    value = 100 * (level - share.value)
    low = 100 * (level - share.high)
    high = 100 * (level - share.low)
    return Estimate(value, low, high)
