"""Examples of a source as tokens: made once, by all ranks together, and mapped from files."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.data.date import asks_for_date
from trainer.data.encode import Encoded, Encoder, Reading
from trainer.data.files import RowError, digest
from trainer.data.rows import Row, rows
from trainer.data.shapes import SHAPES
from trainer.data.shards import UNUSED, Counts, Shard, collect, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2
_SHARD_ROWS = 1024
TOLERATED = 0.1  # of the examples: more than these may be too long only where data.too_long says so


@dataclass(frozen=True)
class Document:
    """Token ids [length], and which of them are labels: predicted from the token before, so never the first."""

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.bool_]


def virtual_ids(count: int) -> list[int]:
    """The ids of virtual tokens."""
    return [-1 - i for i in range(count)]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, as ids that end where it goes on, and the answer that the data has."""

    ids: list[int]
    answer: str


class Tokens:
    """All examples of a source, in its order, each with `virtual` virtual tokens in front.

    `lengths` and `targets` [examples] count the tokens and the labels of each; `rows` [examples] are the numbers of
    their rows. Of the `counts`, `truncated` examples were longer than seq_len and lost their end, `dropped` ones were
    left out.
    """

    def __init__(self, shards: list[Shard], virtual: int = 0) -> None:
        self._shards = shards
        self._front = np.array(virtual_ids(virtual), np.int32)
        self._starts = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])
        self.lengths = np.concatenate([np.diff(shard.offsets) for shard in shards]) + virtual
        self.targets = np.concatenate(
            [np.add.reduceat(shard.target, shard.offsets[:-1], dtype=np.int64) for shard in shards]
        )
        self.rows = np.concatenate([shard.rows for shard in shards])
        self.counts = Counts()
        for shard in shards:
            self.counts.add(shard.counts)
        self.truncated = self.counts.number("truncated")
        self.dropped = self.counts.number("dropped")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        """Document `index`; views of the mapped file where nothing is in front."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, local = self._shards[number], index - self._starts[number]
        part = slice(shard.offsets[local], shard.offsets[local + 1])
        ids, target = shard.ids[part], shard.target[part]
        if not len(self._front):
            return Document(ids, target)
        return Document(np.concatenate([self._front, ids]), np.pad(target, (len(self._front), 0)))

    def largest(self) -> tuple[int, int]:
        """The largest token id of all examples, and the number of the first row that has it."""
        tops = [int(shard.ids.max(initial=-1)) for shard in self._shards]
        number = int(np.argmax(tops))
        shard = self._shards[number]
        place = int(np.argmax(shard.ids == tops[number]))
        example = int(np.searchsorted(shard.offsets, place, side="right")) - 1
        return tops[number], int(shard.rows[example])

    def duplicates(self) -> int:
        """How many examples are equal to an earlier one."""
        seen = {hashlib.blake2b(self.document(i).ids.tobytes(), digest_size=12).digest() for i in range(len(self))}
        return len(self) - len(seen)


def tokenise(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    reading: Reading,
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Tokens:
    """The examples of a file or hub dataset; every rank calls this.

    Made once, by all ranks together, in a folder of `folder` for these data and options. `progress` is called now and
    then with the number of rows that are done. Raises RowError.
    """
    room = reading.seq_len - reading.virtual
    if room < 1:
        raise RowError(
            f"data.seq_len: found {reading.seq_len}, all of it taken by {reading.virtual} virtual tokens: raise it"
        )
    encoder = cache(lambda: Encoder(source, tokenizer, reading))  # it takes a while, and what is cached needs none

    def chunks() -> Iterator[list[Row]]:
        stream = rows(source, reading.columns)
        return iter(lambda: list(islice(stream, _SHARD_ROWS)), [])

    shards = collect(
        folder / _key(source, tokenizer, reading),
        chunks,
        lambda chunk: _shard(encoder(), chunk, room, drop=reading.too_long == "drop"),
        progress,
    )
    tokens = Tokens(shards, reading.virtual)
    _refuse_lost(source, tokens.counts, reading)
    return tokens


def prompts(source: str | Path, tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> list[Prompt]:
    """What to generate from, for each row that has a prompt; of a chat, all before its last assistant turn."""
    encoder = Encoder(source, tokenizer, reading)
    asked = [row for row in rows(source, reading.columns) if row.prompt.strip() or row.messages]
    return [Prompt(ids, _answer(row).strip()) for row, ids in zip(asked, encoder.prompts(asked), strict=True)]


def _answer(row: Row) -> str:
    replies = [message["content"] for message in row.messages if message["role"] == "assistant"]
    return replies[-1] if replies else row.completion


def _key(source: str | Path, tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> str:
    """A digest of all that the tokens depend on; the date only where the chat template asks for it."""
    import transformers

    options = (
        (_FORMAT, _SHARD_ROWS, SHAPES, transformers.__version__, digest(source)),
        (reading.seq_len - reading.virtual, reading.ends, reading.parse_special, reading.too_long == "drop"),
        sorted((reading.columns or {}).items()),
        str(reading.date) if asks_for_date(str(tokenizer.chat_template)) else None,
    )
    total = hashlib.sha256(repr(options).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:32]


def _shard(encoder: Encoder, chunk: list[Row], room: int, *, drop: bool) -> Shard:
    """The examples of some rows, each at most `room` tokens long, and what was noticed about them."""
    counts = Counts(rows=len(chunk))
    kept: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
    numbers = []
    for row, examples in encoder.examples(chunk):
        for column in row.unused:
            counts.notice(UNUSED + column, row.number)
        if row.messages:
            counts.notice("chat", row.number)
            if row.messages[-1]["role"] != "assistant":
                counts.notice("unanswered", row.number)
        if len(examples) > 1:
            counts.notice("split", row.number)
        for example in examples:
            fate = fate_of(example, room, drop)
            _count(counts, example, row.number, fate)
            if fate not in ("dropped", "empty"):
                kept.append((example.ids[:room], example.target[:room]))
                numbers.append(row.number)
    return join(kept, numbers, counts)


def fate_of(example: Encoded, room: int, drop: bool) -> str | None:
    """What becomes of an example that is too long (truncated, or dropped), or has nothing to learn (empty).

    It is left out if that is asked for, or if no label remains.
    """
    if not example.target.any():
        return "empty"
    if len(example.ids) > room:
        return "dropped" if drop or not example.target[:room].any() else "truncated"
    return None


def _count(counts: Counts, example: Encoded, row: int, fate: str | None) -> None:
    counts.examples += 1
    counts.longest = max(counts.longest, len(example.ids))
    found = {fate: fate is not None, "straddles": example.straddles, "control": example.hidden}
    for kind, there in found.items():
        if kind and there:
            counts.notice(kind, row)


def _refuse_lost(source: str | Path, counts: Counts, reading: Reading) -> None:
    """Raise RowError where nothing is left, or more is cut or left out than was agreed to."""
    truncated, dropped = counts.number("truncated"), counts.number("dropped")
    lost, room = truncated + dropped, reading.seq_len - reading.virtual
    mend = f"raise data.seq_len (the longest has {counts.longest + reading.virtual}), or"
    if counts.number("empty") == counts.examples:
        raise RowError(f"{source}: no row has anything to learn: its answers have no tokens")
    if dropped + counts.number("empty") == counts.examples:
        short = "at most" if reading.too_long == "drop" else "a label among its first"
        raise RowError(f"{source}: no row has {short} {room} tokens: raise data.seq_len")
    if reading.too_long == "refuse" and lost:
        row = min(counts.noticed[kind][1] for kind in ("truncated", "dropped") if kind in counts.noticed)
        raise RowError(
            f"{source}, row {row}: longer than data.seq_len {reading.seq_len}, as are {lost} of {counts.examples} "
            f"examples; {mend} say data.too_long: cut | drop"
        )
    if reading.too_long is None and lost > TOLERATED * counts.examples:
        raise RowError(
            f"{source}: {lost} of {counts.examples} examples are longer than data.seq_len {reading.seq_len}: "
            f"{truncated} would be cut and {dropped} lost; {mend} say data.too_long: cut | drop"
        )
