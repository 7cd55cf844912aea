"""Examples of a source as tokens: made once, by all ranks together, and mapped from files."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runfolder.objective import RowsRead
from trainer.data.answers import shard_of_preferences
from trainer.data.counts import WHY_LEFT_OUT, Counts
from trainer.data.encode import Encoder, Ids, LabelMask, Reading
from trainer.data.files import RowError, SourceName
from trainer.data.key import key_of
from trainer.data.making import shard_of_rows
from trainer.data.preferences import PREFERENCES
from trainer.data.rows import Row, asks, read_rows
from trainer.data.shards import RowProgress, Shard, load_or_make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARD_ROWS = 1024
_BY_ROWS: Mapping[RowsRead, tuple[Callable[..., Iterator[Any]], Callable[..., Shard]]] = {
    "answers": (read_rows, shard_of_rows),
    "pairs": (PREFERENCES["pairs"], shard_of_preferences),
    "margins": (PREFERENCES["margins"], shard_of_preferences),
    "judged": (PREFERENCES["judged"], shard_of_preferences),
}
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
    """What a model is asked, as ids that end where it goes on, the answer that the data has, and its row's number."""

    ids: list[int]
    answer: str
    row: int


class Tokens:
    """All examples of a source, in its order, each with `virtual` virtual tokens in front.

    `lengths` and `targets` [examples] count the tokens and the labels of each; `rows` [examples] are the numbers of
    their rows, `desirable` [examples] says of answers that were judged whether they were liked, and `margins`
    [examples] of pairs by how much the better one is to lead. `reference` [examples] is the log-likelihood of the
    labels of each under the policy before the first step: NaN where it was not asked for, None where nobody needs it.
    Of the `counts`, `truncated` examples were longer than seq_len and were cut, `dropped` ones were left out.
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
        desirable = []
        margins = []
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
            desirable.append(shard.desirable)
            margins.append(shard.margins)
        self._starts = np.cumsum(examples)
        from_rows = np.concatenate(lengths)
        self.lengths = from_rows + virtual
        self.targets = np.concatenate(targets)
        self.rows = np.concatenate(rows)
        self.desirable = np.concatenate(desirable)
        self.margins = np.concatenate(margins)
        self.reference: npt.NDArray[np.float64] | None = None
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

    def digest(self) -> str:
        """The sha256 of all ids and labels, with where each example begins."""
        total = hashlib.sha256(self._front.tobytes())
        for shard in self._shards:
            for array in (shard.ids, shard.target, shard.offsets):
                content = np.ascontiguousarray(array)
                total.update(content.tobytes())
        return total.hexdigest()

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

    def duplicates(self, documents: int = 1, compared: int = 1) -> int:
        """How many examples of so many documents are equal to an earlier one, by the first ones of each."""
        starts = range(0, len(self), documents)
        different = set()
        for start in starts:
            hashed = hashlib.blake2b(digest_size=12)
            for index in range(start, start + compared):
                document = self.document(index)
                content = document.ids.tobytes()
                hashed.update(content)
            different.add(hashed.digest())
        return len(starts) - len(different)


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
    read, shard_of = _BY_ROWS[reading.rows]
    encoder = cache(partial(Encoder, source, tokenizer, reading))  # it takes a while, and what is cached needs none

    def chunks() -> Iterator[list[Any]]:
        stream = read(source, reading.columns)
        while chunk := list(islice(stream, _SHARD_ROWS)):
            yield chunk

    def make(chunk: list[Any]) -> Shard:
        return shard_of(encoder(), chunk, reading)

    folder_of_shards = folder / key_of(source, tokenizer, reading, _SHARD_ROWS)
    shards = load_or_make(folder_of_shards, chunks, make, progress)
    tokens = Tokens(shards, reading.virtual)
    _refuse_lost(source, tokens.counts, reading)
    if reading.rows == "judged":
        _refuse_one_label(source, tokens)
    return tokens


def read_prompts(
    source: SourceName, tokenizer: "PreTrainedTokenizerBase", reading: Reading
) -> list[EvaluationPrompt]:
    """What to generate from, for each row that has a prompt; of a chat, all before its last assistant turn."""
    encoder = Encoder(source, tokenizer, reading)
    with_prompt = []
    for row in read_rows(source, reading.columns):
        if asks(row):
            with_prompt.append(row)
    ids_of_prompts = encoder.prompts(with_prompt)
    together = zip(with_prompt, ids_of_prompts, strict=True)
    asked = []
    for row, ids in together:
        answer = _answer(row)
        prompt = EvaluationPrompt(ids, answer.strip(), row.number)
        asked.append(prompt)
    return asked


def _answer(row: Row) -> str:
    """The last answer of a row."""
    for message in reversed(row.messages):
        if message["role"] == "assistant":
            return message["content"]
    return row.completion


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
    if not examples:
        reasons = []
        for kind, why in WHY_LEFT_OUT.items():
            if count := counts.number(kind):
                reasons.append(f"{count} {why}")
        raise RowError(f"{source}: no pair has anything to learn: {', '.join(reasons)}")
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


def _refuse_one_label(source: SourceName, tokens: Tokens) -> None:
    """Raise RowError where all answers were judged alike: nothing says which are better."""
    desirable = tokens.desirable
    mixed = desirable.any() and not desirable.all()
    if not mixed:
        label = "true" if desirable.all() else "false"
        raise RowError(f"{source}: found label {label} in every row, allowed: both true and false")


def _first_row(counts: Counts, *kinds: str) -> int:
    """The number of the first row in which something of these kinds was noticed."""
    first_rows = []
    for kind in kinds:
        if kind in counts.noticed:
            _, row = counts.noticed[kind]
            first_rows.append(row)
    return min(first_rows)
