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
    for result, other in _with_opponents(task):
        lost = _points_lost(task, result)
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


def _with_opponents(task: EvaluatedTask) -> Iterator[tuple[TaskResult, str]]:
    """The adapters, each with whom it is compared with: where a judge was asked, those that it judged."""
    adapters = [result for result in task.results if result is not task.base]
    is_judged = any(result.wins is not None for result in task.results)
    for result in adapters:
        if result.wins is not None:
            yield result, result.wins.against
        elif not is_judged:
            yield result, task.base.label


def _points_lost(task: EvaluatedTask, result: TaskResult) -> Estimate:
    """The points that an adapter lost to whom it is compared with, with their interval."""
    measure = task.measures[0]
    gain = task.to_base(result)[measure]
    even = 0.0
    if result.wins is not None:
        gain = result.wins.rate
        even = _EVEN
    lost = 100 * (even - gain.value)
    low = 100 * (even - gain.high)
    high = 100 * (even - gain.low)
    return Estimate(lost, low, high)
