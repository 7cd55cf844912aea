"""Examples of a source as tokens: made once, by all ranks together, and mapped from files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.counts import UNUSED, Counts
from trainer.data.encode import Encoded, Encoder, Ids, LabelMask, Reading
from trainer.data.files import RowError, SourceName
from trainer.data.key import key_of
from trainer.data.rows import Row, read_rows
from trainer.data.shards import RowProgress, Shard, join_examples, load_or_make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARD_ROWS = 1024
TOLERATED = 0.1  # of the examples: more than these may be too long only where data.too_long says so


@dataclass(frozen=True)
class Document:
    """Token ids [length], and which of them are labels: predicted from the token before, so never the first."""

    ids: Ids
    target: LabelMask


def virtual_ids(count: int) -> list[int]:
    """The ids of virtual tokens: -1, -2, ..., which no tokenizer has."""
    ids = []
    for number in range(count):
        ids.append(-1 - number)
    return ids


@dataclass(frozen=True)
class EvaluationPrompt:
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
        front = virtual_ids(virtual)
        self._front = np.array(front, np.int32)
        counts = Counts()
        examples = [0]
        lengths = []
        targets = []
        rows = []
        for shard in shards:
            counts.add(shard.counts)
            offsets = shard.offsets
            starts = offsets[:-1]
            examples.append(len(starts))
            lengths_of_shard = np.diff(offsets)
            target = shard.target
            targets_of_shard = np.add.reduceat(target, starts, dtype=np.int64)
            lengths.append(lengths_of_shard)
            targets.append(targets_of_shard)
            rows.append(shard.rows)
        self._starts = np.cumsum(examples)
        from_rows = np.concatenate(lengths)
        self.lengths = from_rows + virtual
        self.targets = np.concatenate(targets)
        self.rows = np.concatenate(rows)
        self.counts = counts
        self.truncated = counts.number("truncated")
        self.dropped = counts.number("dropped")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        """Document `index`; views of the mapped file where nothing is in front."""
        starts = self._starts
        behind = np.searchsorted(starts, index, side="right")
        number = behind - 1
        shard = self._shards[number]
        example = index - starts[number]
        offsets = shard.offsets
        start = offsets[example]
        stop = offsets[example + 1]
        ids = shard.ids[start:stop]
        target = shard.target[start:stop]
        virtual = len(self._front)
        if virtual:
            front = self._front
            ids = np.concatenate([front, ids])
            target = np.pad(target, (virtual, 0))
        return Document(ids, target)

    def largest(self) -> tuple[int, int]:
        """The largest token id of all examples, and the number of the first row that has it."""
        largest_ids = []
        for shard in self._shards:
            largest_id = shard.ids.max(initial=-1)
            largest_ids.append(int(largest_id))
        largest = max(largest_ids)
        first = largest_ids.index(largest)
        shard = self._shards[first]
        is_largest = shard.ids == largest
        place = np.argmax(is_largest)
        behind = np.searchsorted(shard.offsets, place, side="right")
        row = shard.rows[behind - 1]
        return largest, int(row)

    def duplicates(self) -> int:
        """How many examples are equal to an earlier one."""
        count = len(self)
        different = set()
        for index in range(count):
            ids = self.document(index).ids
            hashed = hashlib.blake2b(ids.tobytes(), digest_size=12)
            different.add(hashed.digest())
        return count - len(different)


def tokenise(
    source: SourceName,
    tokenizer: "PreTrainedTokenizerBase",
    reading: Reading,
    folder: Path,
    progress: RowProgress = lambda _: None,
) -> Tokens:
    """The examples of a file or hub dataset; every rank calls this.

    Made once, by all ranks together, in a folder of `folder` for these data and options. `progress` is called now and
    then with the number of rows that are done. Raises RowError.
    """
    if reading.max_tokens < 1:
        raise RowError(
            f"data.seq_len: found {reading.seq_len}, all of it taken by {reading.virtual} virtual tokens: raise it"
        )
    encoder = cache(partial(Encoder, source, tokenizer, reading))  # it takes a while, and what is cached needs none

    def chunks() -> Iterator[list[Row]]:
        stream = read_rows(source, reading.columns)
        while chunk := list(islice(stream, _SHARD_ROWS)):
            yield chunk

    def make(chunk: list[Row]) -> Shard:
        return _shard(encoder(), chunk, reading)

    folder_of_shards = folder / key_of(source, tokenizer, reading, _SHARD_ROWS)
    shards = load_or_make(folder_of_shards, chunks, make, progress)
    tokens = Tokens(shards, reading.virtual)
    _refuse_lost(source, tokens.counts, reading)
    return tokens


def read_prompts(
    source: SourceName, tokenizer: "PreTrainedTokenizerBase", reading: Reading
) -> list[EvaluationPrompt]:
    """What to generate from, for each row that has a prompt; of a chat, all before its last assistant turn."""
    encoder = Encoder(source, tokenizer, reading)
    with_prompt = []
    for row in read_rows(source, reading.columns):
        if row.prompt.strip() or row.messages:
            with_prompt.append(row)
    ids_of_prompts = encoder.prompts(with_prompt)
    together = zip(with_prompt, ids_of_prompts, strict=True)
    asked = []
    for row, ids in together:
        answer = _answer(row)
        prompt = EvaluationPrompt(ids, answer.strip())
        asked.append(prompt)
    return asked


def _answer(row: Row) -> str:
    """The last answer of a row."""
    for message in reversed(row.messages):
        if message["role"] == "assistant":
            return message["content"]
    return row.completion


def _shard(encoder: Encoder, chunk: list[Row], reading: Reading) -> Shard:
    """The examples of some rows, each cut to the tokens that it may have, and what was noticed about them."""
    counts = Counts(rows=len(chunk))
    max_tokens = reading.max_tokens
    drop = reading.too_long == "drop"
    kept = []
    numbers = []
    for row, examples in encoder.examples(chunk):
        _notice_row(counts, row)
        if len(examples) > 1:
            counts.notice("split", row.number)
        for example in examples:
            fate = fate_of(example, max_tokens, drop)
            _notice_example(counts, example, row.number, fate)
            if fate in ("dropped", "empty"):
                continue
            ids = example.ids[:max_tokens]
            target = example.target[:max_tokens]
            kept.append((ids, target))
            numbers.append(row.number)
    return join_examples(kept, numbers, counts)


def fate_of(example: Encoded, max_tokens: int, drop: bool) -> str | None:
    """What becomes of an example that is too long (truncated, or dropped), or has nothing to learn (empty).

    It is left out if that is asked for, or if no label remains.
    """
    if not example.target.any():
        return "empty"
    if len(example.ids) <= max_tokens:
        return None
    remaining = example.target[:max_tokens]
    if drop or not remaining.any():
        return "dropped"
    return "truncated"


def _notice_row(counts: Counts, row: Row) -> None:
    for column in row.unused:
        kind = UNUSED + column
        counts.notice(kind, row.number)
    if row.messages:
        counts.notice("chat", row.number)
        last = row.messages[-1]
        if last["role"] != "assistant":
            counts.notice("unanswered", row.number)


def _notice_example(counts: Counts, example: Encoded, row: int, fate: str | None) -> None:
    length = len(example.ids)
    counts.examples += 1
    counts.longest = max(counts.longest, length)
    if fate is not None:
        counts.notice(fate, row)
    if example.straddles:
        counts.notice("straddles", row)
    if example.hidden:
        counts.notice("control", row)


def _refuse_lost(source: SourceName, counts: Counts, reading: Reading) -> None:
    """Raise RowError where nothing is left, or more is cut or left out than was agreed to."""
    examples = counts.examples
    empty = counts.number("empty")
    truncated = counts.number("truncated")
    dropped = counts.number("dropped")
    seq_len = reading.seq_len
    too_long = truncated + dropped
    longest = counts.longest + reading.virtual
    fix = f"raise data.seq_len (the longest has {longest}), or say data.too_long: cut | drop"
    if empty == examples:
        raise RowError(f"{source}: no row has anything to learn: its answers have no tokens")
    if dropped + empty == examples:
        short = "a label among its first"
        if reading.too_long == "drop":
            short = "at most"
        max_tokens = reading.max_tokens
        raise RowError(f"{source}: no row has {short} {max_tokens} tokens: raise data.seq_len")
    if reading.too_long == "refuse" and too_long:
        row = _first_row(counts, "truncated", "dropped")
        raise RowError(
            f"{source}, row {row}: longer than data.seq_len {seq_len}, as are {too_long} of {examples} "
            f"examples; {fix}"
        )
    tolerated = TOLERATED * examples
    if reading.too_long is None and too_long > tolerated:
        raise RowError(
            f"{source}: {too_long} of {examples} examples are longer than data.seq_len {seq_len}: "
            f"{truncated} would be cut and {dropped} lost; {fix}"
        )


def _first_row(counts: Counts, *kinds: str) -> int:
    """The number of the first row in which something of these kinds was noticed."""
    first_rows = []
    for kind in kinds:
        if kind in counts.noticed:
            _, row = counts.noticed[kind]
            first_rows.append(row)
    return min(first_rows)
