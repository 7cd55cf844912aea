"""What an evaluation found: of each adapter and of the base, by task, with intervals and what differs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from orchestrator.comparison.estimates import (
    Estimate,
    difference_of_ratios,
    difference_of_shares,
    ratio_of_sums,
    share,
    win_rate,
)
from orchestrator.comparison.intervals import CONFIDENCE, at_once
from orchestrator.evaluation.process import AnsweredSheet
from orchestrator.evaluation.questions import PreparedTask
from orchestrator.evaluation.scores import Score, Scores

UNTUNED = "base"  # what the base is called among the adapters
LOSS = "loss"
EstimatesByMeasure = dict[str, Estimate]


@dataclass(frozen=True)
class Wins:
    """How an adapter's answers fared before a judge: of each row 1 where they won, 0 where not, one half for a tie.

    `flipped` rows are ties as the judge's choice went with the order of the answers; of these `unread` had no room.
    """

    judge: str
    against: str
    of_rows: tuple[float, ...]
    flipped: int = 0
    unread: int = 0

    @property
    def rate(self) -> Estimate:
        """The share that was won, with its interval."""
        return win_rate(self.of_rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        rate = self.rate.to_json()
        return {**asdict(self), "win_rate": rate}


@dataclass(frozen=True)
class TaskResult:
    """The scores of one adapter, or of the base, in one task.

    `change` is how much the adapter changes the logits of the base, 0 where not at all, None for the base itself.
    `left_out` is the share of a whole model's difference to the base that was not computed.
    """

    label: str
    digest: str
    scores: Scores
    file: str
    change: float | None = None
    run_id: str | None = None
    mlflow_run_id: str | None = None
    left_out: float = 0.0
    wins: Wins | None = None

    @property
    def right(self) -> list[bool]:
        """Of each row, whether it is right."""
        return [score.right for score in self.scores]

    @property
    def share_right(self) -> float:
        """The share of rows that are right."""
        count = sum(self.right)
        return count / len(self.scores)

    @property
    def without_room(self) -> int:
        """How many rows fill all positions of the base, so that nothing could be answered."""
        counts = [score.without_room for score in self.scores]
        return sum(counts)


def result_of_sheet(sheet: AnsweredSheet, scores: Scores) -> TaskResult:
    """What the answers of one adapter, or of the base, are worth by their scores."""
    label = sheet.adapter or UNTUNED
    digest = sheet.digest
    file = str(sheet.path)
    result = TaskResult(label, digest, scores, file)
    return replace(result, change=sheet.change, left_out=sheet.left_out)


@dataclass(frozen=True)
class EvaluatedTask:
    """One task: its rows, and the results of all, the base's first."""

    prepared: PreparedTask
    results: Sequence[TaskResult]

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.prepared.task.name

    @property
    def measures(self) -> tuple[str, ...]:
        """What its results are judged by; what they are sorted by comes first."""
        return self.prepared.task.measures

    @property
    def base(self) -> TaskResult:
        """The result of the base."""
        return self.results[0]

    @property
    def best_first(self) -> list[TaskResult]:
        """The results by the share that is right."""
        return sorted(self.results, key=_share_right, reverse=True)

    @property
    def leaders(self) -> list[TaskResult]:
        """The best result, and those that are not shown to be worse: intervals that hold all at once say so."""
        best, *others = self.best_first
        level = at_once(len(others))
        leaders = [best]
        for other in others:
            behind = difference(self.measures[0], best, other, level)
            if not behind.excludes_zero:
                leaders.append(other)
        return leaders

    def estimates(self, result: TaskResult) -> EstimatesByMeasure:
        """A result by measure, with its intervals."""
        by_measure = {}
        for measure in self.measures:
            by_measure[measure] = estimate(measure, result.scores)
        return by_measure

    def to_base(self, result: TaskResult) -> EstimatesByMeasure:
        """What a result has more than the base, on the same rows."""
        by_measure = {}
        for measure in self.measures:
            by_measure[measure] = difference(measure, result, self.base)
        return by_measure

    def to_json(self) -> dict[str, Any]:
        """The task as plain data."""
        results = []
        for result in self.results:
            plain = self._result_json(result)
            results.append(plain)
        leaders = []
        for leader in self.leaders:
            leaders.append(leader.label)
        return {
            "task": self.name,
            "kind": self.prepared.task.kind,
            "rows": len(self.prepared.rows),
            "results": results,
            "leaders": leaders,
            "pairs": self._pairs_json(),
        }

    def _result_json(self, result: TaskResult) -> dict[str, Any]:
        """A result as plain data, without its scores."""
        plain = asdict(result)
        del plain["scores"]
        del plain["wins"]
        if result.wins is not None:
            plain["wins"] = result.wins.to_json()
        plain["without_room"] = result.without_room
        plain["measures"] = _as_plain(self.estimates(result))
        if result is not self.base:
            plain["to_base"] = _as_plain(self.to_base(result))
        return plain

    def _pairs_json(self) -> list[dict[str, Any]]:
        """What the better one of each two adapters has more than the other, as plain data."""
        adapters = []
        for result in self.best_first:
            if result is not self.base:
                adapters.append(result)
        pairs = []
        for better, other in combinations(adapters, 2):
            more = difference(self.measures[0], better, other)
            pair = {"first": better.label, "second": other.label, "difference": more.to_json()}
            pairs.append(pair)
        return pairs


@dataclass(frozen=True)
class EvaluationReport:
    """Several tasks; `asked` questions were answered now, in `seconds`, all others before."""

    base: str
    tasks: Sequence[EvaluatedTask]
    asked: int
    seconds: float
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain data, without the answers."""
        tasks = []
        for task in self.tasks:
            plain = task.to_json()
            tasks.append(plain)
        return {
            "base": self.base,
            "level": CONFIDENCE,
            "tasks": tasks,
            "asked": self.asked,
            "seconds": self.seconds,
            "warnings": self.warnings,
        }


def estimate(measure: str, scores: Scores) -> Estimate:
    """A measure over all rows, with its interval."""
    if measure == LOSS:
        return ratio_of_sums(_nats(scores), _tokens(scores))
    right = [score.right for score in scores]
    return share(right)


def difference(measure: str, result: TaskResult, other: TaskResult, level: float = CONFIDENCE) -> Estimate:
    """What a measure is more for one than for another on the same rows; of the loss, those that both had room for."""
    if measure != LOSS:
        return difference_of_shares(result.right, other.right, level)
    mine: list[Score] = []
    theirs: list[Score] = []
    for of_one, of_other in zip(result.scores, other.scores, strict=True):
        if of_one.tokens and of_other.tokens:
            mine.append(of_one)
            theirs.append(of_other)
    return difference_of_ratios(_nats(mine), _nats(theirs), _tokens(mine), level)


def _share_right(result: TaskResult) -> float:
    """What results are sorted by."""
    return result.share_right


def _nats(scores: Sequence[Score]) -> list[float]:
    """The loss of each row, in nats."""
    return [score.nats for score in scores]


def _tokens(scores: Sequence[Score]) -> list[int]:
    """The tokens of each row that the loss is of."""
    return [score.tokens for score in scores]


def _as_plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates as plain data."""
    plain = {}
    for measure, value in estimates.items():
        plain[measure] = value.to_json()
    return plain
