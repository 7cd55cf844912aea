"""Examples as text: what of a row the model reads, and which characters of it are learned."""

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trainer.data.control import ControlTokens
from trainer.data.files import RowError
from trainer.data.rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, stop)

_DATE = re.compile(r"""strftime_now\((?:\s*(?P<quote>['"])(?P<form>[^'"]*)(?P=quote)\s*\))?""")


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
        row, hidden = self._hiding(row)
        if row.messages:
            return list(self._chat(row.messages, f"{where}, field messages", hidden))
        text = row.prompt + row.completion
        return [Text(where, text, ((len(row.prompt), len(text)),), hidden=hidden)]

    def asked(self, row: Row) -> Text:
        """What a server is sent for the last answer of a row."""
        where = f"{self._source}, row {row.number}"
        row, hidden = self._hiding(row)
        if not row.messages:
            return Text(where, row.prompt, hidden=hidden)
        last = max(_answers(row.messages))
        text = self._render(row.messages[:last], f"{where}, field messages", add_generation_prompt=True)
        return Text(where, text, rendered=True, hidden=hidden)

    def _hiding(self, row: Row) -> tuple[Row, bool]:
        """The row with the names of control tokens hidden, and whether there are any."""
        control = self._control
        if control is None or not any(control.first(part) for part in _parts(row)):
            return row, False
        messages = tuple({**message, "content": control.hide(message["content"])} for message in row.messages)
        return Row(row.number, control.hide(row.prompt), control.hide(row.completion), messages), True

    def _chat(self, messages: tuple[Message, ...], where: str, hidden: bool) -> Iterator[Text]:
        """Each answer is learned behind what a server is sent for it; answers share a text while it only grows."""
        text, closed = "", False
        learned: list[Span] = []
        for index in _answers(messages):
            asked = self._render(messages[:index], where, add_generation_prompt=True)
            whole = self._render(messages[: index + 1], where)
            if not whole.startswith(asked):
                raise RowError(
                    f"{where}: the chat template changes earlier text when it comes to turn {index}: "
                    "give rows as prompt/completion, or take a template that only appends"
                )
            if not asked.startswith(text):
                yield Text(where, text, tuple(learned), rendered=True, closed=closed, hidden=hidden)
                learned = []
            stop = len(whole.rstrip())
            closed = whole[:stop].endswith(self._ends)
            # What a template writes behind the end of a turn is never generated.
            learned.append((len(asked), stop if closed else len(whole)))
            text = whole
        yield Text(where, text, tuple(learned), rendered=True, closed=closed, hidden=hidden)

    def _render(self, messages: tuple[Message, ...], where: str, **options: Any) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, tokenize=False, **options
                )
            )
        except TemplateError as error:
            raise RowError(f"{where}: the chat template refuses it: {error}") from error


def asks_for_date(template: str | None) -> bool:
    """Whether a chat template writes today's date into what it renders."""
    return template is not None and _DATE.search(template) is not None


def dated(template: str, date: datetime.date | None, source: str | Path) -> str:
    """A chat template with a fixed date in place of today's, so that every day and machine gives the same tokens.

    Raises RowError where there is no date, or where the form of the date is not written in the template.
    """

    def written(call: re.Match[str]) -> str:
        if date is None:
            raise RowError(f"{source}: the chat template writes today's date: say which in data.date")
        if call["form"] is None:
            raise RowError(f"{source}: the chat template computes the form of the date; take one that writes it")
        return json.dumps(date.strftime(call["form"]))

    return _DATE.sub(written, template)


def _answers(messages: tuple[Message, ...]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _parts(row: Row) -> list[str]:
    return [row.prompt, row.completion, *(message["content"] for message in row.messages)]
