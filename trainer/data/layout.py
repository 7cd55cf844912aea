"""Where the documents of a global batch are computed: packed into rows, and dealt to ranks in micro-batches.

All of it is a pure function, equal on every rank. Shape suffixes: B rows of a micro-batch, T positions of its longest
row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.examples import GlobalBatch, Indices

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

IGNORED = -100
_MULTIPLE = 8


class Place(NamedTuple):
    """A document, and the place in the global batch of the example that owns it."""

    example: int
    document: int


Row = list[Place]  # documents that share one sequence
Group = list[Row]  # rows that stay in one micro-batch, as an example has documents in several of them


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes: rows, each a list of documents that share one sequence, and whose they are.

    `examples` has for each example the places of its documents, counted through all rows in their order.
    """

    rows: list[list[int]]
    examples: list[list[int]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "MicroBatch":
        """The micro-batch of these rows."""
        owned: dict[int, list[tuple[int, int]]] = {}
        for number, place in enumerate(chain.from_iterable(rows)):
            owned.setdefault(place.example, []).append((place.document, number))
        examples = [[number for _, number in sorted(those)] for those in owned.values()]
        return cls([[place.document for place in row] for row in rows], examples)


@dataclass(frozen=True)
class Layout:
    """Rows of at most `seq_len` tokens, `micro_batch` of them in a forward pass.

    Without packing a row holds one document. The documents of an example are always in one micro-batch, which may
    take more rows for that.
    """

    seq_len: int
    packing: bool
    micro_batch: int

    def deal(self, batch: GlobalBatch, rank: int, world: int) -> list[MicroBatch]:
        """The micro-batches of one rank: the same number on every rank, some of them perhaps empty.

        Rows are dealt from the longest to the shortest, forth and back over the ranks, so that the ranks have about
        the same tokens, and rows of about the same length at the same time.
        """
        dealt: list[list[Group]] = [[] for _ in range(world)]
        for index, group in enumerate(self._groups(batch)):
            dealt[_dealt_to(index, world)].append(group)
        passes = [_cut(groups, self.micro_batch) for groups in dealt]
        most = max(map(len, passes))
        return [MicroBatch.of(rows) for rows in [*passes[rank], *[[]] * (most - len(passes[rank]))]]

    def _groups(self, batch: GlobalBatch) -> list[Group]:
        """The rows of a batch, in groups that stay together; the longest first."""
        longest_first = np.argsort(-batch.examples.lengths[batch.chosen], kind="stable")
        owned = [
            [Place(place, document) for document in batch.examples.documents(int(batch.chosen[place]))]
            for place in longest_first.tolist()
        ]
        if not self.packing:
            return [[[place] for place in places] for places in owned]
        return _pack(owned, batch.examples.tokens.lengths, self.seq_len)


def _dealt_to(index: int, world: int) -> int:
    turn, place = divmod(index, world)
    return place if turn % 2 == 0 else world - 1 - place


def _cut(groups: Iterable[Group], micro_batch: int) -> list[list[Row]]:
    """The rows of each forward pass: whole groups, as many as fit into `micro_batch` rows, and at least one."""
    passes: list[list[Row]] = []
    for group in groups:
        if passes and len(passes[-1]) + len(group) <= micro_batch:
            passes[-1] += group
        else:
            passes.append(list(group))
    return passes


class _Rows:
    """Rows that are being filled, of which no more than `most` will be opened."""

    def __init__(self, lengths: Indices, seq_len: int, most: int) -> None:
        self.rows: list[Row] = []
        self.free = np.full(most, seq_len)  # tokens that each row has room for, opened or not
        self._lengths = lengths  # of documents

    def tokens(self, places: Row) -> int:
        """The tokens of some documents."""
        return int(self._lengths[[place.document for place in places]].sum())

    def put(self, places: Row, since: int = 0) -> None:
        """Put documents together into the first row, not before row `since`, that has room for all of them."""
        tokens = self.tokens(places)
        row = since + int(np.argmax(self.free[since : len(self.rows) + 1] >= tokens))
        if row == len(self.rows):
            self.rows.append([])
        self.rows[row] += places
        self.free[row] -= tokens


def _pack(owned: Sequence[Row], lengths: Indices, seq_len: int) -> list[Group]:
    """Put each example into the first row that has room for all of it; the groups of rows, longest first.

    An example that no row could hold begins rows of its own, which stay together; others may follow into them.
    """
    filled = _Rows(lengths, seq_len, most=sum(map(len, owned)))
    groups: list[list[int]] = []  # of each, the numbers of its rows
    for places in owned:
        opened = len(filled.rows)
        if filled.tokens(places) <= seq_len:
            filled.put(places)
        else:
            for place in sorted(places, key=lambda place: -filled.tokens([place])):
                filled.put([place], since=opened)
        if len(filled.rows) > opened:
            groups.append(list(range(opened, len(filled.rows))))
    used = np.array([(seq_len - filled.free[group]).sum() for group in groups])
    return [[filled.rows[row] for row in groups[i]] for i in np.argsort(-used, kind="stable")]


def collate(rows: Sequence[Sequence[int]], tokens: "Tokens", pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """The arrays of a micro-batch's rows, each [B, T]; no rows become one of padding without labels.

    `position_ids` restart in each document and in the padding: by that a model tells documents apart, as long as it
    is given no attention mask. `labels` holds the token at its own position, or -100 where it is not learned.
    """
    whole = [[tokens.document(index) for index in row] for row in rows] or [[]]
    longest = max(sum(len(document.ids) for document in row) for row in whole)
    shape = len(whole), max(1, -(-longest // _MULTIPLE)) * _MULTIPLE
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids, labels = np.zeros_like(input_ids), np.full(shape, IGNORED, np.int64)
    for b, row in enumerate(whole):
        at = 0
        for document in row:
            part = slice(at, at := at + len(document.ids))
            input_ids[b, part] = document.ids
            position_ids[b, part] = np.arange(len(document.ids))
            labels[b, part] = np.where(document.target, document.ids, IGNORED)
        position_ids[b, at:] = np.arange(shape[1] - at)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
