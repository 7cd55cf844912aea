"""Examples as tokens: prompts and completions as ids, with the loss on the answer only."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from trainer.rows import SHAPES, Message, Row, RowError, digest, rows
from trainer.shards import Counts, Shard, collect, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = tuple[list[int], bool]  # ids of a part of an example, and whether it is learned

_FORMAT = 1
_SHARD_ROWS = 1024


@dataclass(frozen=True)
class Example:
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

    `lengths` and `targets` [examples] count the tokens and the labels of each; `truncated` examples were longer than
    seq_len and lost their end, `dropped` rows had no label left.
    """

    def __init__(self, shards: list[Shard], virtual: int = 0) -> None:
        self._shards = shards
        self._front = np.array(virtual_ids(virtual), np.int32)
        self._starts = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])
        self.lengths = np.concatenate([np.diff(shard.offsets) for shard in shards]) + virtual
        self.targets = np.concatenate(
            [np.add.reduceat(shard.target, shard.offsets[:-1], dtype=np.int64) for shard in shards]
        )
        self.truncated = sum(shard.counts.truncated for shard in shards)
        self.dropped = sum(shard.counts.dropped for shard in shards)

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Example `index`; views of the mapped file where nothing is in front."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, local = self._shards[number], index - self._starts[number]
        part = slice(shard.offsets[local], shard.offsets[local + 1])
        ids, target = shard.ids[part], shard.target[part]
        if not len(self._front):
            return Example(ids, target)
        return Example(np.concatenate([self._front, ids]), np.pad(target, (len(self._front), 0)))


def tokenise(
    source: str | Path, tokenizer: "PreTrainedTokenizerBase", seq_len: int, cache: Path, virtual: int = 0
) -> Tokens:
    """The examples of a file or hub dataset, each at most `seq_len` tokens long; every rank calls this.

    Of these tokens, `virtual` are virtual ones.

    Made once, by all ranks together, in a folder of `cache` for these data and options. Raises RowError.
    """
    room = seq_len - virtual
    if room < 1:
        raise RowError(f"data.seq_len: found {seq_len}, all of it taken by {virtual} virtual tokens: raise it")
    encoder = _Encoder(source, tokenizer)

    def chunks() -> Iterator[list[Row]]:
        stream = rows(source)
        return iter(lambda: list(islice(stream, _SHARD_ROWS)), [])

    shards = collect(
        cache / _key(source, tokenizer, room), chunks, lambda chunk: _shard(encoder.examples(chunk), room)
    )
    tokens = Tokens(shards, virtual)
    if not len(tokens):
        raise RowError(f"{source}: no row has a label among its first {room} tokens: raise data.seq_len")
    return tokens


def prompts(source: str | Path, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """What to generate from, for each row that has a prompt; of a chat, all before its last assistant turn."""
    encoder = _Encoder(source, tokenizer)
    asked = [row for row in rows(source) if row.prompt.strip() or row.messages]
    return [
        Prompt(encoder.opened([i for ids, _ in parts[:-1] for i in ids]), _answer(row).strip())
        for row, parts in zip(asked, encoder.parts(asked), strict=True)
    ]


def _answer(row: Row) -> str:
    replies = [message["content"] for message in row.messages if message["role"] == "assistant"]
    return replies[-1] if replies else row.completion


def _key(source: str | Path, tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> str:
    """A digest of all that the tokens depend on."""
    import transformers

    options = (_FORMAT, _SHARD_ROWS, SHAPES, seq_len, transformers.__version__, digest(source))
    total = hashlib.sha256(repr(options).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:32]


def _shard(examples: Iterable[tuple[list[int], list[bool]]], seq_len: int) -> Shard:
    """Cut what is longer than `seq_len`, and leave out what has no label then."""
    kept, truncated, dropped = [], 0, 0
    for ids, target in examples:
        if any(target[:seq_len]):
            kept.append((ids[:seq_len], target[:seq_len]))
            truncated += len(ids) > seq_len
        else:
            dropped += 1
    return join(kept, Counts(len(kept) + dropped, truncated, dropped))


class _Encoder:
    """Turns rows into ids, with the boundary between prompt and completion that generation meets.

    Each part is tokenised alone; BOS comes first if the tokenizer adds one, EOS ends the last learned part. Neither
    is added where the text brings its own.
    """

    def __init__(self, source: str | Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.source, self.tokenizer = source, tokenizer
        if next(rows(source)).messages and not tokenizer.chat_template:
            raise RowError(
                f"{source}, field messages: the base's tokenizer has no chat template: "
                "give rows as prompt/completion, or take a base that has one"
            )
        if tokenizer.eos_token_id is None:
            raise RowError(f"{source}: the base's tokenizer has no EOS token, so no answer could end: set eos_token")
        self.eos: int = tokenizer.eos_token_id
        self.bos: list[int] = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]

    def examples(self, chunk: list[Row]) -> Iterator[tuple[list[int], list[bool]]]:
        """Ids and targets of each row."""
        for parts in self.parts(chunk):
            if self.eos not in parts[-1][0]:
                parts.append(([self.eos], True))
            ids = list(chain.from_iterable(ids for ids, _ in parts))
            target = [learned for ids, learned in parts for _ in ids]
            opened = self.opened(ids)
            target = [False] * (len(opened) - len(ids)) + target
            yield opened, [False, *target[1:]]

    def opened(self, ids: list[int]) -> list[int]:
        """The ids with BOS, if the tokenizer adds one."""
        return ids if ids[:1] == self.bos else self.bos + ids

    def parts(self, chunk: list[Row]) -> list[list[Part]]:
        """The parts of each row as ids."""
        texts = [list(self._texts(row)) for row in chunk]
        flat = [text for row in texts for text, _ in row]
        ids = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
        return [[(next(ids), learned) for _, learned in row] for row in texts]

    def _texts(self, row: Row) -> Iterator[tuple[str, bool]]:
        if row.messages:
            yield from self._turns(row.messages, f"{self.source}, row {row.number}, field messages")
        else:
            yield row.prompt, False
            yield row.completion, True

    def _turns(self, messages: tuple[Message, ...], where: str) -> Iterator[tuple[str, bool]]:
        """Up to each assistant turn as the chat template asks for it, then the turn as the template has it."""
        done = ""
        for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            asked = self._render(messages[:index], where, add_generation_prompt=True)
            whole = self._render(messages[: index + 1], where)
            if not asked.startswith(done) or not whole.startswith(asked):
                raise RowError(
                    f"{where}: the chat template changes earlier text when it comes to turn {index}: "
                    "give rows as prompt/completion, or take a template that only appends"
                )
            yield asked[len(done) :], False
            yield whole[len(asked) :], True
            done = whole

    def _render(self, messages: tuple[Message, ...], where: str, **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except TemplateError as error:
            raise RowError(f"{where}: the chat template refuses it: {error}") from error
