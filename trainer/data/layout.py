"""Where the documents of a global batch are computed: packed into rows, and dealt to ranks in micro-batches.

All of it is a pure function, equal on every rank. Shape suffixes: B rows of a micro-batch, T positions of its longest
row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from trainer.data.examples import GlobalBatch, Indices

IGNORED = -100
MULTIPLE = 8


class OwnedDocument(NamedTuple):
    """A document, and the place in the global batch of the example that owns it."""

    example: int
    document: int


PackedRow = list[OwnedDocument]  # documents that share one sequence
Numbered = tuple[int, int]  # a document, and its place in a micro-batch
RowGroup = list[PackedRow]  # rows that stay in one micro-batch, as an example has documents in several of them


def _document_numbers(row: PackedRow) -> list[int]:
    """The documents of a row, in its order."""
    numbers = []
    for owned in row:
        numbers.append(owned.document)
    return numbers


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes: rows, each a list of documents that share one sequence, and their examples.

    `examples` has for each example the places of its documents, counted through all rows in their order.
    """

    rows: list[list[int]]
    examples: list[list[int]]

    @classmethod
    def of(cls, rows: Sequence[PackedRow]) -> "MicroBatch":
        """The micro-batch that is made of these rows."""
        numbered: dict[int, list[Numbered]] = {}  # by the example that owns the documents
        owned_documents = chain.from_iterable(rows)
        for number, owned in enumerate(owned_documents):
            documents = numbered.setdefault(owned.example, [])
            documents.append((owned.document, number))
        examples = []
        for documents in numbered.values():
            documents.sort()
            numbers = []
            for _, number in documents:
                numbers.append(number)
            examples.append(numbers)
        numbers_of_rows = list(map(_document_numbers, rows))
        return cls(numbers_of_rows, examples)


@dataclass(frozen=True)
class Layout:
    """Rows of at most `seq_len` tokens, `micro_batch` of them in a forward pass.

    Without packing a row holds one document. The documents of an example are always in one micro-batch, which may
    take more rows for that.
    """

    seq_len: int
    packing: bool
    micro_batch: int

    def deal(self, batch: GlobalBatch, rank: int, world_size: int) -> list[MicroBatch]:
        """The micro-batches of one rank: the same number on every rank, some of them perhaps empty.

        Rows are dealt from the longest to the shortest, forth and back over the ranks, so that the ranks have about
        the same tokens, and rows of about the same length at the same time.
        """
        groups = self._groups(batch)
        dealt = _dealt(groups, world_size)
        passes = []
        for groups_of_rank in dealt:
            passes_of_rank = _cut(groups_of_rank, self.micro_batch)
            passes.append(passes_of_rank)
        most = max(map(len, passes))
        passes_of_rank = passes[rank]
        while len(passes_of_rank) < most:
            passes_of_rank.append([])
        return [MicroBatch.of(rows) for rows in passes_of_rank]

    def _groups(self, batch: GlobalBatch) -> list[RowGroup]:
        """The rows of a batch, in groups that stay together; the longest first."""
        examples = batch.examples
        lengths = examples.lengths[batch.chosen]
        longest_first = np.argsort(-lengths, kind="stable")
        documents_by_example = []
        saved_by_example = []
        for place in longest_first.tolist():
            example = int(batch.chosen[place])
            numbers = examples.documents(example)
            documents = []
            for number in numbers:
                documents.append(OwnedDocument(place, number))
            documents_by_example.append(documents)
            saved = examples.saved(example)
            saved_by_example.append(saved)
        together = list(zip(documents_by_example, saved_by_example, strict=True))
        most = sum(map(len, documents_by_example))
        lengths_of_documents = examples.tokens.lengths
        rows = _Rows(lengths_of_documents, self.seq_len, most)
        if self.packing:
            return _pack(together, rows)
        groups = []
        for documents, saved in together:
            group = [[document] for document in documents]
            tokens = rows.tokens(documents, saved)
            if saved and tokens <= self.seq_len:
                group = [documents]
            groups.append(group)
        return groups


def _dealt(groups: Iterable[RowGroup], world_size: int) -> list[list[RowGroup]]:
    """The groups of each rank: ranks 0, 1, ... take one each in this order, then in the opposite one, and so on."""
    dealt: list[list[RowGroup]] = []
    while len(dealt) < world_size:
        dealt.append([])
    for index, group in enumerate(groups):
        turn, rank = divmod(index, world_size)
        backwards = turn % 2 == 1
        if backwards:
            rank = world_size - 1 - rank
        groups_of_rank = dealt[rank]
        groups_of_rank.append(group)
    return dealt


def _cut(groups: Iterable[RowGroup], micro_batch: int) -> list[list[PackedRow]]:
    """The rows of each forward pass: whole groups, as many as fit into `micro_batch` rows, and at least one."""
    passes: list[list[PackedRow]] = []
    for group in groups:
        rows = len(group)
        if passes:
            rows += len(passes[-1])
        if not passes or rows > micro_batch:
            passes.append([])
        passes[-1] += group
    return passes


class _Rows:
    """Rows that are being filled, of which no more than `most` will be opened."""

    def __init__(self, lengths: Indices, seq_len: int, most: int) -> None:
        self.rows: list[PackedRow] = []
        self._seq_len = seq_len
        self._free = np.full(most, seq_len)  # tokens that still fit into each row, opened or not
        self._lengths = lengths  # of documents

    def put_example(self, documents: PackedRow, saved: int) -> list[int]:
        """Put an example into the first row that has space for all of it; gives the numbers of the rows it opens.

        An example that no row could hold begins rows of its own.
        """
        opened = len(self.rows)
        if self.tokens(documents, saved) <= self._seq_len:
            self._put(documents, 0, saved)
        else:
            longest_first = sorted(documents, key=self._length, reverse=True)
            for document in longest_first:
                self._put([document], opened)
        numbers = range(opened, len(self.rows))
        return list(numbers)

    def used(self, numbers: list[int]) -> int:
        """The tokens that some rows hold."""
        free = self._free[numbers]
        used = self._seq_len - free
        return int(used.sum())

    def _length(self, owned: OwnedDocument) -> int:
        length = self._lengths[owned.document]
        return int(length)

    def tokens(self, documents: PackedRow, saved: int) -> int:
        """How many tokens some documents have together, less those that they share."""
        numbers = _document_numbers(documents)
        lengths = self._lengths[numbers]
        total = int(lengths.sum())
        return total - saved

    def _put(self, documents: PackedRow, first: int, saved: int = 0) -> None:
        """Put documents together into the first row, not before row `first`, that has space for all of them."""
        tokens = self.tokens(documents, saved)
        opened = len(self.rows)
        free = self._free[first : opened + 1]
        fits = free >= tokens
        first_that_fits = int(fits.argmax())
        row = first + first_that_fits
        rows = self.rows
        if row == opened:
            rows.append([])
        rows[row] += documents
        self._free[row] -= tokens


def _pack(examples: Sequence[tuple[PackedRow, int]], filled: "_Rows") -> list[RowGroup]:
    """Put each example, with the tokens that it saves, into the first row that has space; the longest groups first.

    The rows that an example begins because no row could hold it stay together; others may follow into them.
    """
    groups: list[list[int]] = []  # of each, the numbers of its rows
    for documents, saved in examples:
        opened = filled.put_example(documents, saved)
        if opened:
            groups.append(opened)
    used_by_groups = list(map(filled.used, groups))
    used = np.array(used_by_groups)
    longest_first = np.argsort(-used, kind="stable")
    packed = []
    for group in longest_first:
        numbers = groups[group]
        rows = []
        for number in numbers:
            rows.append(filled.rows[number])
        packed.append(rows)
    return packed
