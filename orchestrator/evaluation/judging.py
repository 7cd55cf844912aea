"""Win rates: a judge compares the answers of each adapter with those of the base, or of another one.

A model reads both answers and says which is better, A or B, by the likelier letter. Each pair is asked in both
orders; a choice that goes with the order is a tie (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.4).
A reward model gives every answer a number, and the higher one wins.

Judging is an evaluation of its own: its answers are kept as all others are, and nobody is asked twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

from orchestrator.errors import InputError
from orchestrator.evaluation.choices import ChoiceRow
from orchestrator.evaluation.process import AllAnswers
from orchestrator.evaluation.questions import Preparation, PreparedTask
from orchestrator.evaluation.report import UNTUNED, EvaluatedTask, Wins
from orchestrator.evaluation.scores import Score, score_task
from orchestrator.evaluation.task import TaskSpec
from serving.kept import KeptAnswer
from trainer.data.rows import Row

HALF_WON = 0.5
_BEHIND_QUESTION = (" A", " B")
_JUDGE_QUESTION = (
    "Two answers to the same request are to be compared. The better one is {criterion}.\n\n"
    "The request:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    "Say with one letter which answer is better, A or B.\nThe better answer is"
)
_COMPARED = {
    "name": "judged",
    "kind": "choice",
    "data": "answers",
    "prompt": "-",
    "choices": _BEHIND_QUESTION,
    "answer": "-",
}
_REWARDED = {"name": "rewarded", "kind": "exact_match", "data": "answers"}
AskJudge = Callable[[PreparedTask], AllAnswers]


class Duel(NamedTuple):
    """A row of a task, an adapter's answer to it, and the one that it is compared with."""

    task: TaskSpec
    row: Row
    mine: str
    theirs: str

    @property
    def differ(self) -> bool:
        """Whether there is anything to compare."""
        mine = self.mine.strip()
        theirs = self.theirs.strip()
        return mine != theirs


class DuelEnd(NamedTuple):
    """What came of a duel: 1, 0 or a tie; whether the order alone decided, and whether it had no room."""

    won: float
    flipped: bool = False
    unread: bool = False


_TIED = DuelEnd(HALF_WON)
_NOT_READ = DuelEnd(HALF_WON, unread=True)


class Judge(Protocol):
    """Who decides duels; `name` is what it is called in reports, and `asked` what it had to answer for that."""

    name: str
    asked: list[AllAnswers]

    def decide(self, duels: Sequence[Duel]) -> list[DuelEnd]:
        """A verdict for each duel."""
        ...


@dataclass
class ModelJudge:
    """A model that reads both answers, each pair in both orders."""

    name: str
    preparation: Preparation
    chats: bool
    answer: AskJudge
    asked: list[AllAnswers] = field(default_factory=list)

    def decide(self, duels: Sequence[Duel]) -> list[DuelEnd]:
        """Won where both orders say so; answers that are the same are a tie, and nobody is asked."""
        rows: list[ChoiceRow] = []
        for number, duel in enumerate(duels):
            if duel.differ:
                rows += _both_orders(number, duel)
        ends = [_TIED] * len(duels)
        if not rows:
            return ends
        spec = TaskSpec.model_validate({**_COMPARED, "chat": self.chats})
        prepared = self.preparation.prepare_choices(spec, rows)
        answered = self.answer(prepared)
        self.asked.append(answered)
        (sheet,) = answered.sheets
        scores = score_task(prepared, sheet.file.answers)
        pairs = zip(rows[::2], scores[::2], scores[1::2], strict=True)
        for row, first, second in pairs:
            ends[row.number] = _agreed(first, second)
        return ends


@dataclass
class RewardJudge:
    """A reward model, which gives each answer a number."""

    name: str
    preparation: Preparation
    answer: AskJudge
    asked: list[AllAnswers] = field(default_factory=list)

    def decide(self, duels: Sequence[Duel]) -> list[DuelEnd]:
        """Won by the higher number."""
        rows: list[Row] = []
        for duel in duels:
            for answer in (duel.mine, duel.theirs):
                rows.append(_with_answer(duel.row, answer))
        spec = TaskSpec.model_validate(_REWARDED)
        prepared = self.preparation.prepare_texts(spec, rows)
        answered = self.answer(prepared)
        self.asked.append(answered)
        (sheet,) = answered.sheets
        kept = sheet.file.answers
        found = []
        for asked in prepared.rows:
            key = asked.question.key
            found.append(kept[key])
        ends = []
        for mine, theirs in zip(found[::2], found[1::2], strict=True):
            ends.append(_higher(mine, theirs))
        return ends


def judged_tasks(tasks: Sequence[EvaluatedTask], judge: Judge, against: str) -> list[EvaluatedTask]:
    """The tasks, each result with its wins against the one of a label; the judge is asked once for all."""
    duels: list[Duel] = []
    for task in tasks:
        duels += _duels(task, against)
    ends = iter(judge.decide(duels))
    judged = []
    for task in tasks:
        count = len(task.prepared.rows)
        results = []
        for result in task.results:
            if result.label != against:
                of_rows = list(islice(ends, count))
                wins = _wins(judge.name, against, of_rows)
                result = replace(result, wins=wins)
            results.append(result)
        with_wins = replace(task, results=results)
        judged.append(with_wins)
    return judged


def require_written(tasks: Sequence[TaskSpec], of_harness: Sequence[str]) -> None:
    """Raise InputError for tasks in which nothing is written that a judge could read."""
    problems = []
    for task in tasks:
        if task.kind == "choice":
            problems.append(f"--judge: task {task.name} is of kind choice; allowed: exact_match or generation")
    for name in of_harness:
        problems.append(f"--judge: task lm_eval:{name} is judged by the harness; allowed: tasks in files")
    if problems:
        raise InputError("\n".join(problems))


def opponent(against: str | None, labels: Mapping[str, str], judge: str | None) -> str:
    """The label of whom all others are compared with: given as one, or as the key of one; raises InputError."""
    if against and not judge:
        raise InputError("--against: found no --judge; allowed: with --judge, which compares the answers")
    if against is None or against == UNTUNED:
        return UNTUNED
    if against in labels:
        return labels[against]
    if against in labels.values():
        return against
    known = ", ".join([UNTUNED, *labels.values()])
    raise InputError(f"--against: found {against}; allowed: {known}")


def _duels(task: EvaluatedTask, against: str) -> list[Duel]:
    """The answers of all others to each row of a task, each beside the one of a label."""
    by_label = {result.label: result for result in task.results}
    theirs = by_label[against].scores
    spec = task.prepared.task
    duels = []
    for result in task.results:
        if result is by_label[against]:
            continue
        together = zip(task.prepared.rows, result.scores, theirs, strict=True)
        for asked, mine, other in together:
            assert asked.row is not None
            duel = Duel(spec, asked.row, mine.written, other.written)
            duels.append(duel)
    return duels


def _wins(judge: str, against: str, ends: Sequence[DuelEnd]) -> Wins:
    """What came of an adapter's duels in one task."""
    of_rows = []
    flipped = 0
    unread = 0
    for end in ends:
        of_rows.append(end.won)
        flipped += end.flipped
        unread += end.unread
    return Wins(judge, against, tuple(of_rows), flipped, unread)


def _agreed(first: Score, second: Score) -> DuelEnd:
    """What a model's choices in both orders come to; each is right where it chose the adapter's answer."""
    if first.without_room or second.without_room:
        return _NOT_READ
    if first.right != second.right:
        return DuelEnd(HALF_WON, flipped=True)
    won = float(first.right)
    return DuelEnd(won)


def _higher(mine: KeptAnswer, theirs: KeptAnswer) -> DuelEnd:
    """What the numbers that a reward model gave come to."""
    if mine.without_room or theirs.without_room:
        return _NOT_READ
    (of_mine,) = mine.log_likelihoods
    (of_theirs,) = theirs.log_likelihoods
    if of_mine == of_theirs:
        return _TIED
    won = float(of_mine > of_theirs)
    return DuelEnd(won)


def _both_orders(number: int, duel: Duel) -> Iterator[ChoiceRow]:
    """What a model is asked of a duel; right is the letter of the adapter's answer."""
    mine = duel.mine.strip()
    theirs = duel.theirs.strip()
    shown = _shown(duel.row)
    criterion = duel.task.criterion
    orders = ((mine, theirs), (theirs, mine))
    for right, order in enumerate(orders):
        first, second = order
        asked = _JUDGE_QUESTION.format(criterion=criterion, prompt=shown, first=first, second=second)
        yield ChoiceRow(number, asked, _BEHIND_QUESTION, right)


def _shown(row: Row) -> str:
    """What was asked, as a judge reads it: the prompt, or the turns of a chat before the last answer."""
    if not row.messages:
        return row.prompt.strip()
    turns = []
    for message in row.messages[:-1]:
        role = message["role"]
        content = message["content"]
        turns.append(f"{role}: {content}")
    return "\n".join(turns)


def _with_answer(row: Row, answer: str) -> Row:
    """A row with another answer at its end."""
    if not row.messages:
        return replace(row, completion=answer)
    content = answer.strip()
    last: dict[str, Any] = {"role": "assistant", "content": content}
    before = row.messages[:-1]
    messages = (*before, last)
    return replace(row, messages=messages, only_last=True)
