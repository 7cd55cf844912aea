"""Examples as token ids, with the loss on the answer only.

The ids are those of the whole text: what a server sends to the model, and what the model then writes. Where answer
and prompt share a token, it is learned: a token belongs to an answer if it stands for a character of it. EOS ends
what has no end of its own.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from runfolder.objective import RowsRead
from trainer.data.control import ControlTokens
from trainer.data.files import RowError, SourceName
from trainer.data.offsets import IdList, IdsAndOffsets, Offsets, end_of_text, starts_and_stops, untrimmed
from trainer.data.rows import Row
from trainer.data.text import Renderer, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runfolder.job import Job


TextsByPlace = dict[int, Text]
Ids = npt.NDArray[np.int32]
LabelMask = npt.NDArray[np.bool_]  # by token: whether it is a label


@dataclass(frozen=True)
class Reading:
    """How rows become tokens: all that the ids depend on beside data and tokenizer.

    An example has at most `seq_len` tokens, of which `virtual` are virtual ones in front. `ends` are the ids at which
    generation stops; EOS is always one of them. `date` is what a chat template takes for today. `rows` are what the
    objective learns from. For the rest, see `Data` in the job.
    """

    seq_len: int
    virtual: int = 0
    columns: Mapping[str, str] | None = None
    too_long: Literal["drop", "cut", "refuse"] | None = None
    parse_special: bool = False
    ends: tuple[int, ...] = ()
    date: datetime.date | None = None
    rows: RowsRead = "answers"

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
            rows=job.objective.rows,
        )

    @property
    def documents(self) -> int:
        """How many documents an example of these rows has."""
        return 1 if self.rows == "answers" else 2

    @property
    def learned_documents(self) -> int:
        """How many of those are its own, the first ones: a judged answer's neighbour is not."""
        if self.rows == "judged":
            return 1
        return self.documents

    @property
    def max_tokens(self) -> int:
        """The tokens of an example that may come from its row."""
        return self.seq_len - self.virtual


@dataclass(frozen=True)
class Encoded:
    """An example whole: ids and labels [length].

    `straddles`: what a server is sent for an answer of it has other ids than the example has there. `hidden`: its
    data has names of control tokens.
    """

    ids: Ids
    target: LabelMask
    straddles: bool
    hidden: bool


class Encoder:
    """Turns rows of a source into ids; raises RowError at once where the tokenizer cannot do it."""

    def __init__(self, source: SourceName, tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> None:
        if tokenizer.eos_token_id is None:
            raise RowError(f"{source}: the base's tokenizer has no EOS token, so no answer could end: set eos_token")
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise RowError(f"{source}: the base's tokenizer ({kind}) gives no offsets: it needs a tokenizer.json")
        self._source = source
        self._chat_template = tokenizer.chat_template
        self._eos: int = tokenizer.eos_token_id
        self._bos: str | None = tokenizer.bos_token
        self._tokenizer = untrimmed(tokenizer)
        control = ControlTokens(self._tokenizer)
        self._control = control
        self._commands = sorted(control.commands)
        self._parse_special = reading.parse_special
        probe = self._tokenizer("a", return_special_tokens_mask=True)
        is_special = probe["special_tokens_mask"]
        self._leading: int = is_special.index(0)  # special tokens in front of a text
        end_ids = [self._eos, *reading.ends]
        ends = tokenizer.convert_ids_to_tokens(end_ids)
        date = reading.date
        hiding = None if reading.parse_special else control
        self._renderer = Renderer(source, tokenizer, tuple(ends), date, hiding)

    def examples(self, rows: list[Row]) -> Iterator[tuple[Row, list[Encoded]]]:
        """The examples of each row, whole."""
        self._need_template(rows)
        texts = []
        counts = []
        for row in rows:
            texts_of_row = self._renderer.texts(row)
            texts += texts_of_row
            count = len(texts_of_row)
            counts.append(count)
        examples = self._examples_of(texts)
        rows_and_counts = zip(rows, counts, strict=True)
        for row, count in rows_and_counts:
            examples_of_row = islice(examples, count)
            yield row, list(examples_of_row)

    def opening(self, ids: Ids) -> int:
        """How many control tokens an example begins with."""
        is_command = np.isin(ids, self._commands)
        with_end = np.append(is_command, False)
        return int(with_end.argmin())

    def prompts(self, rows: list[Row]) -> list[IdList]:
        """What a server would be sent for the last answer of each row."""
        self._need_template(rows)
        prompts = []
        for row in rows:
            prompt = self._renderer.asked(row)
            prompts.append(prompt)
        return self._opened(prompts)

    def _examples_of(self, texts: list[Text]) -> Iterator[Encoded]:
        """The examples that texts are, in their order."""
        all_read = self._read(texts)
        prompts_of_texts = self._prompts_of(texts)
        together = zip(texts, all_read, prompts_of_texts, strict=True)
        for text, read, prompts in together:
            yield self._labelled(text, read, prompts)

    def _prompts_of(self, texts: list[Text]) -> list[list[IdList]]:
        """For each text, the ids that a server is sent for each of its answers."""
        prompts = []
        counts = []
        for text in texts:
            prompts_of_text = text.prompts()
            prompts += prompts_of_text
            count = len(prompts_of_text)
            counts.append(count)
        opened = iter(self._opened(prompts))
        ids = []
        for count in counts:
            ids_of_text = islice(opened, count)
            ids.append(list(ids_of_text))
        return ids

    def _need_template(self, rows: Iterable[Row]) -> None:
        if self._chat_template:
            return
        if any(row.messages for row in rows):
            raise RowError(
                f"{self._source}, field messages: the base's tokenizer has no chat template: "
                "give rows as prompt/completion, or take a base that has one"
            )

    def _read(self, texts: list[Text]) -> list[IdsAndOffsets]:
        """Ids and offsets of texts, in their order."""
        with_special: TextsByPlace = {}  # to which the tokenizer adds special tokens
        without: TextsByPlace = {}
        hidden: TextsByPlace = {}
        for place, text in enumerate(texts):
            if text.hidden:
                hidden[place] = text
            elif self._adds_special(text):
                with_special[place] = text
            else:
                without[place] = text
        batch = self._read_batch(with_special, add_special_tokens=True)
        read = dict(batch)
        batch = self._read_batch(without, add_special_tokens=False)
        read.update(batch)
        for place, text in hidden.items():
            read[place] = self._read_hidden(text)
        in_order = []
        for place in range(len(texts)):
            in_order.append(read[place])
        return in_order

    def _read_batch(self, texts: TextsByPlace, *, add_special_tokens: bool) -> Iterator[tuple[int, IdsAndOffsets]]:
        """Each place, and ids and offsets of the text there."""
        if not texts:
            return
        plain_texts = []
        for text in texts.values():
            plain_texts.append(text.text)
        batch = self._tokenizer(
            plain_texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
        all_ids = batch["input_ids"]
        all_offsets = batch["offset_mapping"]
        all_read = zip(texts, all_ids, all_offsets, strict=True)
        for place, ids, offsets in all_read:
            text = texts[place]
            if not self._parse_special:
                control = self._control
                control.check(ids, offsets, text.text, text.where)
            read = (ids, offsets)
            yield place, read

    def _read_hidden(self, text: Text) -> IdsAndOffsets:
        control = self._control
        where = text.where
        adds_special = self._adds_special(text)
        return control.read(text.text, add_special_tokens=adds_special, where=where)

    def _adds_special(self, text: Text) -> bool:
        """Whether the tokenizer puts its BOS in front: not where a template, or the data, has written its own."""
        if text.rendered:
            return False
        if text.hidden or self._bos is None:
            return True
        return not text.text.startswith(self._bos)

    def _labelled(self, text: Text, read: IdsAndOffsets, prompts: list[IdList]) -> Encoded:
        """The example that a text is; `prompts` are what a server is sent for its answers."""
        ids, offsets = read
        target = self._target(text, ids, offsets)
        straddles = False
        for prompt in prompts:
            beginning = ids[: len(prompt)]
            straddles |= beginning != prompt
        eos = self._eos
        last = ids[-1:]
        has_end = text.closed or last == [eos]
        if not has_end:
            ids = [*ids, eos]
            target = np.append(target, True)
        target[0] = False  # there is nothing in front to predict it from
        ids_of_example = np.array(ids, np.int32)
        return Encoded(ids_of_example, target, straddles, text.hidden)

    def _target(self, text: Text, ids: IdList, offsets: Offsets) -> LabelMask:
        """Which tokens stand for a character of an answer, or follow the text."""
        starts, stops = starts_and_stops(offsets)
        is_text = stops > starts
        is_command = np.isin(ids, self._commands)
        target = np.zeros_like(is_text)
        for start, stop in text.learned:
            starts_before = starts < start
            overlaps = (stops > start) & (starts < stop)
            # A control token of the template may take spaces of the answer with it; it is not learned for that.
            of_template = is_command & starts_before
            in_answer = overlaps & is_text
            target |= in_answer & ~of_template
        end = end_of_text(is_text)
        target[end:] = True  # what the tokenizer itself puts behind the answer
        return target

    def _opened(self, prompts: list[Text]) -> list[IdList]:
        """The ids of prompts without what the tokenizer puts behind a text: the answer goes on there."""
        opened = []
        for ids, offsets in self._read(prompts):
            starts, stops = starts_and_stops(offsets)
            is_text = stops > starts
            end = self._leading
            if is_text.any():
                end = end_of_text(is_text)
            opened.append(ids[:end])
        return opened
