"""What answers are worth: computed when they are read, so that another rule of what is right asks nobody again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.evaluation.questions import AskedRow, PreparedTask
from orchestrator.evaluation.task import TaskSpec
from serving.kept import KeptAnswer
from trainer.answers import matches

_COMMA = re.compile(r"(?<=\d),(?=\d)")
_SPELLED_OUT = {"number": r"-?\d[\d,]*(?:\.\d+)?"}


@dataclass(frozen=True)
class Score:
    """What an answer is worth: whether it is right, and of a loss, nats and tokens.

    `shown` is the answer as people read it, the likeliest text where one is chosen; `written` is it as it came.
    """

    right: bool
    shown: str
    nats: float = 0.0
    tokens: int = 0
    without_room: bool = False
    written: str = ""


Scores = tuple[Score, ...]  # of one adapter in one task, by row


def score_task(prepared: PreparedTask, answers: Mapping[str, KeptAnswer]) -> Scores:
    """The scores of all rows of a task, by the answers to their questions."""
    task = prepared.task
    judge = _score_written
    if task.kind == "choice":
        judge = _score_choice
    scores: list[Score] = []
    for row in prepared.rows:
        answer = answers[row.question.key]
        score = judge(task, row, answer)
        scores.append(score)
    return tuple(scores)


def _score_written(task: TaskSpec, row: AskedRow, answer: KeptAnswer) -> Score:
    """Whether what was written is right, and the loss of what should have been; what had no room is not right."""
    written = cut_off(answer.text or "", task.stop)
    shown = written.strip()
    if answer.without_room:
        return Score(False, shown, without_room=True)
    right = is_right(written, row.expected, task.extract)
    tokens = sum(text.count for text in row.question.texts)
    nats = -sum(answer.log_likelihoods)
    return Score(right, shown, nats, tokens, written=written)


def _score_choice(task: TaskSpec, row: AskedRow, answer: KeptAnswer) -> Score:
    """Whether the likeliest text is the right one."""
    values: list[float] = []
    texts = row.question.texts
    for choice, text, log_likelihood in zip(row.choices, texts, answer.log_likelihoods, strict=True):
        size = 1
        if task.normalise == "characters":
            size = len(choice.strip())
        elif task.normalise == "tokens":
            size = text.count
        value = log_likelihood / size
        values.append(value)
    highest = max(values)
    chosen = values.index(highest)
    right = chosen == row.right and not answer.without_room
    shown = row.choices[chosen].strip()
    return Score(right, shown, without_room=answer.without_room)


def cut_off(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some others."""
    for stop in stops:
        text, _, _ = text.partition(stop)
    return text


def is_right(written: str, expected: str, extract: str | None) -> bool:
    """Whether what was written is what is expected; with `extract`, whether what that finds in both is the same."""
    if extract is None:
        return matches(written, expected)
    wanted = extracted(expected, extract)
    if wanted is None:
        wanted = _comparable(expected)
    return extracted(written, extract) == wanted


def extracted(text: str, extract: str) -> str | None:
    """The last match of an expression, or of its first group, without commas in numbers; None without a match."""
    expression = _SPELLED_OUT.get(extract, extract)
    compiled = re.compile(expression)
    last = None
    for match in compiled.finditer(text):
        last = match
    if last is None:
        return None
    group = min(1, compiled.groups)
    return _comparable(last[group] or "")


def _comparable(text: str) -> str:
    """A text without spaces at its ends and commas in numbers."""
    without_spaces = text.strip()
    return _COMMA.sub("", without_spaces)
