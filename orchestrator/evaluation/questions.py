"""A task's rows as questions: token ids made by the code that made those the adapters were trained on."""

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation.choices import ChoiceRow, read_choices
from orchestrator.evaluation.task import TaskSpec, described
from serving.question import Question, ScoredText, TokenRange
from trainer.data.rows import Row, read_rows

if TYPE_CHECKING:
    from trainer.data.encode import Encoded, Encoder

_NO_QUESTION = Question()  # of a row that somebody else has asked
_ENDLESS = 1 << 30  # tokens of a row: what has no room on the base is found by who asks


@dataclass(frozen=True)
class AskedRow:
    """A row of a task: what is asked, as people read it and as token ids, and what is right.

    Of a choice, `choices` are the texts and `right` is the number of the right one. Where something is written, `row`
    is what was read.
    """

    number: int
    prompt: str
    expected: str
    question: Question = _NO_QUESTION
    choices: tuple[str, ...] = ()
    right: int = 0
    row: Row | None = None

    @property
    def key(self) -> str:
        """The digest of what is asked and what is right."""
        question = self.question.key
        facts = [question, self.prompt, self.expected, self.right]
        text = json.dumps(facts)
        digest = hashlib.sha256(text.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class PreparedTask:
    """A task with its rows."""

    task: TaskSpec
    rows: tuple[AskedRow, ...]

    @property
    def key(self) -> str:
        """The digest of how its questions are made of its data."""
        text = json.dumps(described(self.task), sort_keys=True)
        digest = hashlib.sha256(text.encode())
        return digest.hexdigest()

    def dump(self) -> dict[str, Any]:
        """What the evaluating process has to know of it."""
        questions = []
        for row in self.rows:
            questions.append(row.question.dump())
        return {"name": self.task.name, "key": self.key, "questions": questions}


class Preparation:
    """Makes questions of the rows of tasks, for one base."""

    def __init__(self, tokenizer: Any, ends: tuple[int, ...]) -> None:
        """`ends` are the ids at which generation stops."""
        self._tokenizer = tokenizer
        self._ends = ends

    def prepare(self, task: TaskSpec, limit: int | None) -> PreparedTask:
        """The first rows of a task, at most `limit` of them; raises RowError."""
        most = task.rows or limit
        if most is not None and limit is not None:
            most = min(most, limit)
        if task.kind == "choice":
            choices = islice(read_choices(task), most)
            return self.prepare_choices(task, list(choices))
        with_prompt = filter(_has_prompt, read_rows(task.data, task.columns))
        rows = islice(with_prompt, most)
        asked = self._rows(task, list(rows), self._encoder(task))
        return PreparedTask(task, tuple(asked))

    def prepare_choices(self, task: TaskSpec, choices: Sequence[ChoiceRow]) -> PreparedTask:
        """A task of choices between these texts."""
        encoder = self._encoder(task)
        asked = self._choices(task, choices, encoder)
        return PreparedTask(task, tuple(asked))

    def prepare_texts(self, task: TaskSpec, rows: list[Row]) -> PreparedTask:
        """A task that gives each row, with its answer and the end of that, one number."""
        encoder = self._encoder(task)
        asked = []
        for row, examples in encoder.examples(rows):
            ids = examples[-1].ids.tolist()
            text = ScoredText(tuple(ids), ())
            question = Question(texts=(text,))
            asked.append(AskedRow(row.number, "", "", question))
        return PreparedTask(task, tuple(asked))

    def answers_to(self, task: TaskSpec, prompts: Sequence[str]) -> list[Question]:
        """A question for each prompt, which is answered as the task says."""
        rows = []
        for number, prompt in enumerate(prompts, start=1):
            rows.append(Row(number, prompt, ""))
        asked = self._rows(task, rows, self._encoder(task))
        return [row.question for row in asked]

    def choices_after(self, task: TaskSpec, prompts: Sequence[str], texts: tuple[str, ...]) -> list[Question]:
        """A question for each prompt: the log-likelihood of each text behind it."""
        choices = []
        for number, prompt in enumerate(prompts, start=1):
            choices.append(ChoiceRow(number, prompt, texts, right=0))
        encoder = self._encoder(task)
        asked = self._choices(task, choices, encoder)
        return [row.question for row in asked]

    def _encoder(self, task: TaskSpec) -> "Encoder":
        """What makes token ids of a task's rows."""
        from trainer.data.encode import Encoder, Reading

        date = task.date or datetime.date.today()
        reading = Reading(
            _ENDLESS,
            columns=task.columns,
            parse_special=task.parse_special,
            ends=self._ends,
            date=date,
        )
        return Encoder(task.data, self._tokenizer, reading)

    def _rows(self, task: TaskSpec, rows: list[Row], encoder: "Encoder") -> Iterator[AskedRow]:
        """A question for each row: its prompt, and of a generation the texts whose loss is asked."""
        if task.chat:
            rows = list(map(_as_chat, rows))
        prompts = encoder.prompts(rows)
        texts: list[tuple[ScoredText, ...]] = [()] * len(rows)
        if task.kind == "generation":
            texts = list(_scored_rows(rows, encoder))
        of_rows = zip(rows, prompts, texts, strict=True)
        for row, ids, scored in of_rows:
            prompt_ids = tuple(ids)
            question = Question(prompt_ids, task.max_new_tokens, self._ends, task.stop, scored)
            prompt = self._shown(ids)
            expected = _expected(row)
            yield AskedRow(row.number, prompt, expected, question, row=row)

    def _choices(self, task: TaskSpec, choices: Sequence[ChoiceRow], encoder: "Encoder") -> Iterator[AskedRow]:
        """A question for each row: the log-likelihood of each text that may be chosen, behind the prompt."""
        rows: list[Row] = []
        for choice in choices:
            for text in choice.texts:
                row = Row(choice.number, choice.prompt, text)
                rows.append(row)
        if task.chat:
            rows = list(map(_as_chat, rows))
        prompts = iter(encoder.prompts(rows))
        scored = _scored_rows(rows, encoder)
        for choice in choices:
            texts: list[ScoredText] = []
            ids: list[int] = []
            for _ in choice.texts:
                ids = next(prompts)
                (scored_text,) = next(scored)
                if not task.chat:
                    scored_text = self._without_end(scored_text)
                texts.append(scored_text)
            question = Question(tuple(ids), texts=tuple(texts))
            prompt = self._shown(ids)
            expected = choice.texts[choice.right].strip()
            yield AskedRow(choice.number, prompt, expected, question, choice.texts, choice.right)

    def _shown(self, ids: Sequence[int]) -> str:
        """A prompt as people read it, with the names of control tokens."""
        text = self._tokenizer.decode(list(ids))
        return str(text)

    def _without_end(self, text: ScoredText) -> ScoredText:
        """A text without the end that no text to choose has by itself."""
        eos = self._tokenizer.eos_token_id
        *others, last = text.ranges
        first, stop = last
        is_single = stop - first < 2
        if is_single or text.ids[-1] != eos:
            return text
        shorter = (first, stop - 1)
        return ScoredText(text.ids[:-1], (*others, shorter))


def _has_prompt(row: Row) -> bool:
    """Whether anything can be asked."""
    if row.messages:
        return True
    return bool(row.prompt.strip())


def _as_chat(row: Row) -> Row:
    """A row as two turns of a chat; one that is a chat is left as it is."""
    if row.messages:
        return row
    asked = {"role": "user", "content": row.prompt.strip()}
    answered = {"role": "assistant", "content": row.completion.strip()}
    return Row(row.number, "", "", (asked, answered))


def _expected(row: Row) -> str:
    """The last answer of a row."""
    answer = row.completion
    for message in row.messages:
        if message["role"] == "assistant":
            answer = message["content"]
    return answer.strip()


def _scored_rows(rows: list[Row], encoder: "Encoder") -> Iterator[tuple[ScoredText, ...]]:
    """The examples of each row as texts whose labels are scored."""
    for _, examples in encoder.examples(rows):
        yield tuple(map(_scored, examples))


def _scored(example: "Encoded") -> ScoredText:
    """An example as a text whose labels are scored."""
    ranges: list[TokenRange] = []
    first = 0
    was_label = False
    labels = [*example.target.tolist(), False]
    for place, is_label in enumerate(labels):
        if is_label and not was_label:
            first = place
        if was_label and not is_label:
            ranges.append((first, place))
        was_label = is_label
    ids = example.ids.tolist()
    return ScoredText(tuple(ids), tuple(ranges))
