"""Examples as text: what of a row the model reads, and which characters of it are learned."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trainer.data.chats import Messages
from trainer.data.control import ControlTokens
from trainer.data.date import dated
from trainer.data.files import RowError, SourceName
from trainer.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CharacterSpan = tuple[int, int]  # characters [start, stop)


@dataclass(frozen=True)
class Text:
    """An example, or a prompt, as text.

    `learned` are the spans that the loss counts, in order. `rendered` text was made by a chat template, which writes
    BOS and ends of turns itself; `closed` text has an end of turn behind its last answer. `hidden`: names of control
    tokens in the data are hidden in it (see ControlTokens).
    """

    where: str
    text: str
    learned: tuple[CharacterSpan, ...] = ()
    rendered: bool = False
    closed: bool = False
    hidden: bool = False

    @property
    def up_to_last_answer(self) -> str:
        """The text up to the end of its last answer; nothing where it has none."""
        if not self.learned:
            return ""
        last = self.learned[-1]
        _, stop = last
        return self.text[:stop]

    def prompts(self) -> list["Text"]:
        """What a server is sent for each of its answers; none for an answer that stands at the beginning."""
        prompts = []
        for start, _ in self.learned:
            if start:
                before = self.text[:start]
                prompt = replace(self, text=before, learned=())
                prompts.append(prompt)
        return prompts


class Renderer:
    """Turns rows into texts, by the base's chat template where they are chats.

    `ends` are the names of the tokens at which generation stops. `date` is what a template takes for today. With
    `control`, names of control tokens in the data are text.
    """

    def __init__(
        self,
        source: SourceName,
        tokenizer: "PreTrainedTokenizerBase",
        ends: tuple[str, ...],
        date: datetime.date | None,
        control: ControlTokens | None,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._ends = ends
        self._date = date
        self._control = control

    @cached_property
    def _template(self) -> str:
        template = self._tokenizer.get_chat_template()
        return dated(template, self._date, self._source)

    def texts(self, row: Row) -> list[Text]:
        """The examples that a row makes: one; of a chat, one more for each answer that changes what came before."""
        where = f"{self._source}, row {row.number}"
        row, hidden = self._hiding(row, where)
        if row.messages:
            where_chat = f"{where}, field messages"
            empty = Text(where_chat, "", rendered=True, hidden=hidden)
            examples = self._chat(row, empty)
            return list(examples)
        prompt = row.prompt
        text = prompt + row.completion
        start = len(prompt)
        answer = (start, len(text))
        example = Text(where, text, (answer,), hidden=hidden)
        return [example]

    def asked(self, row: Row) -> Text:
        """What a server is sent for the last answer of a row."""
        where = f"{self._source}, row {row.number}"
        row, hidden = self._hiding(row, where)
        if not row.messages:
            return Text(where, row.prompt, hidden=hidden)
        messages = row.messages
        answers = _answers(messages)
        last = max(answers)
        before_answer = messages[:last]
        where_chat = f"{where}, field messages"
        text = self._render(before_answer, where_chat, add_generation_prompt=True)
        return Text(where, text, rendered=True, hidden=hidden)

    def _hiding(self, row: Row, where: str) -> tuple[Row, bool]:
        """The row with the names of control tokens hidden, and whether there are any."""
        control = self._control
        if control is None:
            return row, False
        texts = _texts_in(row)
        if not any(map(control.first, texts)):
            return row, False
        if any(map(control.has_stand_in, texts)):
            raise RowError(f"{where}: private characters (U+F0000 and above) beside names of control tokens")
        messages = []
        for message in row.messages:
            content = control.hide(message["content"])
            messages.append({**message, "content": content})
        prompt = control.hide(row.prompt)
        completion = control.hide(row.completion)
        hiding = replace(row, prompt=prompt, completion=completion, messages=tuple(messages))
        return hiding, True

    def _chat(self, row: Row, text: Text) -> Iterator[Text]:
        """Each answer is learned behind what a server is sent for it; answers share a text while it only grows.

        `text` is where that begins: an empty text.
        """
        messages = row.messages
        answers = _answers(messages)
        if row.only_last:
            answers = answers[-1:]
        for index in answers:
            turns = messages[: index + 1]
            asked, whole = self._asked_and_whole(turns, text.where)
            # What a template writes behind the end of a turn is never generated, and perhaps not kept by later turns.
            if not asked.startswith(text.up_to_last_answer):
                yield text
                text = replace(text, learned=())
            start = len(asked)
            last = turns[-1]
            answer = last["content"]
            stop = self._end(whole, start, answer)
            closed = stop is not None
            if stop is None:
                stop = len(whole)
            learned = (*text.learned, (start, stop))
            text = replace(text, text=whole, learned=learned, closed=closed)
        yield text

    def _asked_and_whole(self, messages: Messages, where: str) -> tuple[str, str]:
        """What a server is sent for the last of these turns, and the same with that answer behind it.

        Raises RowError where a turn is missing in them.
        """
        before = messages[:-1]
        last = len(before)
        asked = self._render(before, where, add_generation_prompt=True)
        whole = self._whole(messages, asked, where)
        start = len(asked)
        answered = whole[start:]
        answer = messages[last:]
        _require_all(before, asked, where)
        _require_all(answer, answered, where, last)
        return asked, whole

    def _whole(self, messages: Messages, asked: str, where: str) -> str:
        """What a server is sent for the last answer, and the answer as the template writes it.

        A template may put a system turn where the last question is, and leave it out once that is answered: then what
        stands directly before the answer is the same in both.
        """
        whole = self._render(messages, where)
        if whole.startswith(asked):
            return whole
        last = messages[-1]
        answer = last["content"].strip()
        place = whole.rfind(answer)
        before = ""
        if place >= 0:
            before = whole[:place].rstrip()
        alike = _common_length(asked, before)
        directly_before = before[alike:]
        if directly_before and asked.endswith(directly_before):
            goes_on = len(before)
            return asked + whole[goes_on:]
        turn = len(messages) - 1
        raise RowError(
            f"{where}: the chat template changes earlier text when it comes to turn {turn}, which it "
            "asks for in other words than it writes it: give rows as prompt/completion, or take another template"
        )

    def _end(self, whole: str, start: int, answer: str) -> int | None:
        """Where the end of the turn stops that the template writes behind an answer; None where it writes none."""
        written = answer.strip()  # templates leave out the spaces around it
        place = whole.find(written, start)
        behind = start
        if place >= 0:
            behind = place + len(written)
        stops = []
        for end in self._ends:
            begin = whole.find(end, behind)
            if begin >= 0:
                stop = begin + len(end)
                stops.append(stop)
        return min(stops, default=None)

    def _render(self, messages: Messages, where: str, **options: Any) -> str:
        """What the chat template makes of turns. Raises RowError for whatever it raises."""
        tokenizer = self._tokenizer
        turns = list(messages)
        try:
            template = self._template
            rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **options)
            return str(rendered)
        except RowError:
            raise
        except TemplateError as error:
            raise RowError(f"{where}: the chat template refuses it: {error}") from error
        except Exception as error:  # a template can raise whatever Python's operators do
            kind = type(error).__name__
            raise RowError(f"{where}: the chat template fails: {kind}: {error}") from error


def _require_all(messages: Messages, text: str, where: str, first: int = 0) -> None:
    """Raise RowError where a text lacks a turn, spaces aside; earlier answers may be rewritten, as thoughts are."""
    squeezed = _squeezed(text)
    for index, message in enumerate(messages, first):
        role = message["role"]
        if role == "assistant" and len(messages) > 1:
            continue
        content = _squeezed(message["content"])
        if content not in squeezed:
            raise RowError(f"{where}[{index}]: the chat template leaves out (some of) this {role} turn")


def _common_length(a: str, b: str) -> int:
    """The number of characters with which two texts begin alike."""
    length = 0
    pairs = zip(a, b, strict=False)
    for x, y in pairs:
        if x != y:
            break
        length += 1
    return length


def _squeezed(text: str) -> str:
    words = text.split()
    return "".join(words)


def _answers(messages: Messages) -> list[int]:
    """The places of the assistant's turns."""
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            answers.append(index)
    return answers


def _texts_in(row: Row) -> list[str]:
    texts = [row.prompt, row.completion]
    for message in row.messages:
        texts.append(message["content"])
    return texts
