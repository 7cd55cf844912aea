"""Examples as text: what of a row the model reads, and which characters of it are learned."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trainer.data.control import ControlTokens
from trainer.data.date import dated
from trainer.data.files import RowError
from trainer.data.rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, stop)


@dataclass(frozen=True)
class Text:
    """An example, or a prompt, as text.

    `learned` are the spans that the loss counts, in order. `rendered` text was made by a chat template, which writes
    BOS and ends of turns itself; `closed` text has an end of turn behind its last answer. `hidden`: names of control
    tokens in the data are hidden in it (see ControlTokens).
    """

    where: str
    text: str
    learned: tuple[Span, ...] = ()
    rendered: bool = False
    closed: bool = False
    hidden: bool = False


class Renderer:
    """Turns rows into texts, by the base's chat template where they are chats.

    `ends` are the names of the tokens at which generation stops. `date` is what a template takes for today. With
    `control`, names of control tokens in the data are text.
    """

    def __init__(
        self,
        source: str | Path,
        tokenizer: "PreTrainedTokenizerBase",
        ends: tuple[str, ...],
        date: datetime.date | None,
        control: ControlTokens | None,
    ) -> None:
        self._source, self._tokenizer, self._ends, self._control = source, tokenizer, ends, control
        self._date = date

    @cached_property
    def _template(self) -> str:
        return dated(self._tokenizer.get_chat_template(), self._date, self._source)

    def texts(self, row: Row) -> list[Text]:
        """The examples that a row makes: one; of a chat, one more for each answer that changes what came before."""
        where = f"{self._source}, row {row.number}"
        row, hidden = self._hiding(row, where)
        if row.messages:
            return list(self._chat(row.messages, f"{where}, field messages", hidden))
        text = row.prompt + row.completion
        return [Text(where, text, ((len(row.prompt), len(text)),), hidden=hidden)]

    def asked(self, row: Row) -> Text:
        """What a server is sent for the last answer of a row."""
        where = f"{self._source}, row {row.number}"
        row, hidden = self._hiding(row, where)
        if not row.messages:
            return Text(where, row.prompt, hidden=hidden)
        last = max(_answers(row.messages))
        text = self._render(row.messages[:last], f"{where}, field messages", add_generation_prompt=True)
        return Text(where, text, rendered=True, hidden=hidden)

    def _hiding(self, row: Row, where: str) -> tuple[Row, bool]:
        """The row with the names of control tokens hidden, and whether there are any."""
        control = self._control
        if control is None or not any(control.first(part) for part in _parts(row)):
            return row, False
        if any(control.has_stand_in(part) for part in _parts(row)):
            raise RowError(f"{where}: private characters (U+F0000 and above) beside names of control tokens")
        messages = tuple({**message, "content": control.hide(message["content"])} for message in row.messages)
        return Row(row.number, control.hide(row.prompt), control.hide(row.completion), messages), True

    def _chat(self, messages: tuple[Message, ...], where: str, hidden: bool) -> Iterator[Text]:
        """Each answer is learned behind what a server is sent for it; answers share a text while it only grows."""
        text, closed = "", False
        learned: list[Span] = []
        for index in _answers(messages):
            asked = self._render(messages[:index], where, add_generation_prompt=True)
            whole = self._whole(messages[: index + 1], asked, where)
            _require_all(messages[:index], asked, where)
            _require_all(messages[index : index + 1], whole[len(asked) :], where, index)
            # What a template writes behind the end of a turn is never generated, and perhaps not kept by later turns.
            if not asked.startswith(text[: learned[-1][1]] if learned else ""):
                yield Text(where, text, tuple(learned), rendered=True, closed=closed, hidden=hidden)
                learned = []
            end = self._end(whole, len(asked), messages[index]["content"])
            closed = end is not None
            learned.append((len(asked), len(whole) if end is None else end))
            text = whole
        yield Text(where, text, tuple(learned), rendered=True, closed=closed, hidden=hidden)

    def _whole(self, messages: tuple[Message, ...], asked: str, where: str) -> str:
        """What a server is sent for the last answer, and the answer as the template writes it.

        A template may put a system turn where the last question is, and leave it out once that is answered: then what
        stands directly before the answer is the same in both.
        """
        whole = self._render(messages, where)
        if whole.startswith(asked):
            return whole
        place = whole.rfind(messages[-1]["content"].strip())
        before = whole[:place].rstrip() if place >= 0 else ""
        alike = _alike(asked, before)
        if before[alike:] and asked.endswith(before[alike:]):
            return asked + whole[len(before) :]
        raise RowError(
            f"{where}: the chat template changes earlier text when it comes to turn {len(messages) - 1}, which it "
            "asks for in other words than it writes it: give rows as prompt/completion, or take another template"
        )

    def _end(self, whole: str, start: int, answer: str) -> int | None:
        """Where the end of the turn stops that the template writes behind an answer; None where it writes none."""
        place = whole.find(answer.strip(), start)
        behind = place + len(answer.strip()) if place >= 0 else start
        found = [whole.find(end, behind) + len(end) for end in self._ends if end in whole[behind:]]
        return min(found, default=None)

    def _render(self, messages: tuple[Message, ...], where: str, **options: Any) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, tokenize=False, **options
                )
            )
        except RowError:
            raise
        except TemplateError as error:
            raise RowError(f"{where}: the chat template refuses it: {error}") from error
        except Exception as error:  # a template can raise whatever Python's operators do
            raise RowError(f"{where}: the chat template fails: {type(error).__name__}: {error}") from error


def _require_all(messages: tuple[Message, ...], text: str, where: str, first: int = 0) -> None:
    """Raise RowError where a text lacks a turn, spaces aside; earlier answers may be rewritten, as thoughts are."""
    there = _squeezed(text)
    for index, message in enumerate(messages, first):
        earlier_answer = message["role"] == "assistant" and len(messages) > 1
        if not earlier_answer and _squeezed(message["content"]) not in there:
            raise RowError(f"{where}[{index}]: the chat template leaves out (some of) this {message['role']} turn")


def _alike(a: str, b: str) -> int:
    """The number of characters with which two texts begin alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _answers(messages: tuple[Message, ...]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _parts(row: Row) -> list[str]:
    return [row.prompt, row.completion, *(message["content"] for message in row.messages)]
