"""Examples as token ids, with the loss on the answer only.

The ids are those of the whole text: what a server sends to the model, and what the model then writes. Where answer
and prompt share a token, it is learned: a token belongs to an answer if it stands for a character of it. EOS ends
what has no end of its own.
"""

import copy
import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trainer.data.control import ControlTokens, Read
from trainer.data.files import RowError
from trainer.data.rows import Row
from trainer.data.text import Renderer, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runfolder.job import Job


@dataclass(frozen=True)
class Reading:
    """How rows become tokens: all that the ids depend on beside data and tokenizer.

    An example has at most `seq_len` tokens, of which `virtual` are virtual ones in front. `ends` are the ids at which
    generation stops; EOS is always one of them. `date` is what a chat template takes for today. For the rest, see
    `Data` in the job.
    """

    seq_len: int
    virtual: int = 0
    columns: Mapping[str, str] | None = None
    too_long: Literal["drop", "cut", "refuse"] | None = None
    parse_special: bool = False
    ends: tuple[int, ...] = ()
    date: datetime.date | None = None

    @classmethod
    def of(cls, job: "Job", ends: tuple[int, ...] = ()) -> "Reading":
        """How a job reads its rows."""
        data = job.data
        return cls(
            seq_len=data.seq_len,
            virtual=job.method.virtual_tokens,
            columns=data.columns,
            too_long=data.too_long,
            parse_special=data.parse_special,
            ends=ends,
            date=data.date,
        )


@dataclass(frozen=True)
class Encoded:
    """An example whole: ids and labels [length].

    `straddles`: what a server is sent for an answer of it has other ids than the example has there. `hidden`: its
    data has names of control tokens.
    """

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.bool_]
    straddles: bool
    hidden: bool


class Encoder:
    """Turns rows of a source into ids; raises RowError at once where the tokenizer cannot do it."""

    def __init__(self, source: str | Path, tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> None:
        if tokenizer.eos_token_id is None:
            raise RowError(f"{source}: the base's tokenizer has no EOS token, so no answer could end: set eos_token")
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise RowError(f"{source}: the base's tokenizer ({kind}) gives no offsets: it needs a tokenizer.json")
        self._source, self._chat_template = source, tokenizer.chat_template
        self._eos: int = tokenizer.eos_token_id
        self._bos: str | None = tokenizer.bos_token
        self._tokenizer = _untrimmed(tokenizer)
        self._control = ControlTokens(self._tokenizer)
        self._commands = sorted(self._control.commands)
        self._parse_special = reading.parse_special
        self._leading: int = self._tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"].index(0)
        ends = tokenizer.convert_ids_to_tokens([self._eos, *reading.ends])
        shown = None if reading.parse_special else self._control
        self._renderer = Renderer(source, tokenizer, tuple(ends), reading.date, shown)

    def examples(self, rows: list[Row]) -> Iterator[tuple[Row, list[Encoded]]]:
        """The examples of each row, whole."""
        self._need_template(rows)
        texts = [self._renderer.texts(row) for row in rows]
        flat = [text for those in texts for text in those]
        read = iter(zip(self._read(flat), self._asked_alike(flat), strict=True))
        for row, those in zip(rows, texts, strict=True):
            examples = []
            for text in those:
                (ids, offsets), asked = next(read)
                examples.append(self._labelled(text, ids, offsets, asked))
            yield row, examples

    def prompts(self, rows: list[Row]) -> list[list[int]]:
        """What a server would be sent for the last answer of each row."""
        self._need_template(rows)
        return [self._opened(*read) for read in self._read([self._renderer.asked(row) for row in rows])]

    def _asked_alike(self, texts: list[Text]) -> list[list[list[int]]]:
        """For each text, the ids that a server is sent for each of its answers."""
        prompts = [
            replace(text, text=text.text[:start], learned=()) for text in texts for start, _ in text.learned if start
        ]
        read = iter(self._read(prompts))
        return [[self._opened(*next(read)) for start, _ in text.learned if start] for text in texts]

    def _need_template(self, rows: Iterable[Row]) -> None:
        if not self._chat_template and any(row.messages for row in rows):
            raise RowError(
                f"{self._source}, field messages: the base's tokenizer has no chat template: "
                "give rows as prompt/completion, or take a base that has one"
            )

    def _read(self, texts: list[Text]) -> list[Read]:
        """Ids and offsets of texts, in their order."""
        read: list[Read | None] = [None] * len(texts)
        for special in (True, False):
            chosen = [i for i, text in enumerate(texts) if not text.hidden and self._adds_special(text) == special]
            if chosen:
                batch = self._tokenizer(
                    [texts[i].text for i in chosen],
                    add_special_tokens=special,
                    return_offsets_mapping=True,
                    verbose=False,
                )
                for i, ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
                    if not self._parse_special:
                        self._control.check(ids, offsets, texts[i].text, texts[i].where)
                    read[i] = ids, offsets
        return [done or self._read_hidden(text) for done, text in zip(read, texts, strict=True)]

    def _read_hidden(self, text: Text) -> Read:
        return self._control.read(text.text, add_special_tokens=self._adds_special(text), where=text.where)

    def _adds_special(self, text: Text) -> bool:
        """Whether the tokenizer puts its BOS in front: not where a template, or the data, has written its own."""
        own = not text.hidden and self._bos is not None and text.text.startswith(self._bos)
        return not (text.rendered or own)

    def _labelled(
        self, text: Text, ids: list[int], offsets: list[tuple[int, int]], asked: list[list[int]]
    ) -> Encoded:
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        command = np.isin(ids, self._commands)
        target = np.zeros(len(ids), np.bool_)
        for start, stop in text.learned:
            # A control token of the template may take spaces of the answer with it; it is not learned for that.
            target |= (stops > start) & (starts < stop) & (stops > starts) & ~(command & (starts < start))
        target[_end_of_text(starts, stops) :] = True  # what the tokenizer itself puts behind the answer
        straddles = any(ids[: len(prompt)] != prompt for prompt in asked)
        if not text.closed and ids[-1:] != [self._eos]:
            ids, target = [*ids, self._eos], np.append(target, True)
        target[0] = False  # there is nothing in front to predict it from
        return Encoded(np.array(ids, np.int32), target, straddles, text.hidden)

    def _opened(self, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
        """A prompt's ids without what the tokenizer puts behind a text: the answer goes on there."""
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        if not (stops > starts).any():
            return ids[: self._leading]
        return ids[: _end_of_text(starts, stops)]


def _end_of_text(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> int:
    """The number of tokens up to the last one that stands for a part of the text."""
    of_text = np.flatnonzero(stops > starts)
    return int(of_text[-1]) + 1 if len(of_text) else len(starts)


def _untrimmed(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, with offsets that count the space in front of a word; the ids are the same."""
    processor = tokenizer.backend_tokenizer.post_processor
    described = processor.__getstate__().decode() if processor else ""
    if '"trim_offsets":true' not in described:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    changed = own.backend_tokenizer.post_processor
    changed.__setstate__(described.replace('"trim_offsets":true', '"trim_offsets":false').encode())
    own.backend_tokenizer.post_processor = changed
    return own
