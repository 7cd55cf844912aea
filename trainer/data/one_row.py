"""Global batches whose documents lie one behind the other in one row for each micro-batch, and so need no padding.

All of it is a pure function, equal on every rank. Shape suffixes: B rows, T positions.
"""

import heapq
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer.data.collate import OTHER_BRANCH, TRUNK
from trainer.data.examples import Examples, GlobalBatch, Indices
from trainer.data.layout import MULTIPLE, Layout, MicroBatch, OwnedDocument, PackedRow

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

StartPlaces = npt.NDArray[np.int32]
EVERY_ROW = np.zeros(0, np.int32)  # in the place of starts: each row is one document, without padding


def deal_in_one_row(layout: Layout, batch: GlobalBatch, rank: int, world_size: int) -> list[MicroBatch]:
    """The micro-batches of one rank: the same number on every rank, of about as many tokens, some perhaps empty.

    There are as many as the layout's rows would make if they were full, or held a document each without packing. From
    the longest on, each example goes to the one with the fewest tokens so far. Documents that are all of one length
    keep a row each.
    """
    examples = batch.examples
    rounds = _rounds(layout, batch, world_size)
    count = rounds * world_size
    passes: list[PackedRow] = []
    least_filled = []
    for number in range(count):
        passes.append([])
        least_filled.append((0, number))
    lengths = examples.lengths_in_one_row[batch.chosen]
    longest_first = np.argsort(-lengths, kind="stable")
    for place in longest_first.tolist():
        tokens, number = least_filled[0]
        documents = _owned(examples, batch, place)
        passes[number] += documents
        tokens += int(lengths[place])
        heapq.heapreplace(least_filled, (tokens, number))
    dealt = []
    for row in passes[rank::world_size]:
        rows = _rows(row, examples.tokens)
        micro = MicroBatch.of(rows)
        dealt.append(micro)
    return dealt


def _rounds(layout: Layout, batch: GlobalBatch, world_size: int) -> int:
    """How many micro-batches each rank has."""
    rows_at_once = layout.micro_batch * world_size
    lengths = batch.examples.lengths_in_one_row[batch.chosen]
    rows = int(lengths.sum()) / layout.seq_len
    if not layout.packing:
        documents = list(batch.documents())
        rows = len(documents)
    rounds = ceil(rows / rows_at_once)
    return max(1, rounds)


def _owned(examples: Examples, batch: GlobalBatch, place: int) -> PackedRow:
    """The documents of the example at a place of the batch."""
    example = int(batch.chosen[place])
    numbers = examples.documents(example)
    owned = []
    for number in numbers:
        document = OwnedDocument(place, number)
        owned.append(document)
    return owned


def _rows(documents: PackedRow, tokens: "Tokens") -> list[PackedRow]:
    """All documents in one row; each in its own where none would be padded."""
    if not documents:
        return []
    lengths = {int(tokens.lengths[owned.document]) for owned in documents}
    shortest = min(lengths)
    unlike = len(lengths) > 1
    padded = shortest % MULTIPLE > 0
    if unlike or padded:
        return [documents]
    rows = []
    for owned in documents:
        row = [owned]
        rows.append(row)
    return rows


def starts_of_documents(position_BT: npt.NDArray[Any]) -> StartPlaces:
    """Where documents start in flattened rows, and where the last ends, by positions that restart: int32.

    EVERY_ROW where each row is one document, which needs no more than causal attention.
    """
    before_BT = np.roll(position_BT, 1, axis=1)
    is_start_BT = position_BT != before_BT + 1
    is_start_BT[:, 0] = True
    starts = np.flatnonzero(is_start_BT)
    if len(starts) == len(position_BT):
        return EVERY_ROW
    end = position_BT.size
    with_end = np.append(starts, end)
    return with_end.astype(np.int32)


def gathered_keys(starts_S: StartPlaces, part_BT: npt.NDArray[Any]) -> tuple[StartPlaces, Indices]:
    """Of documents in flattened rows, where the keys that each one sees begin, and the place of each of these keys.

    A second answer, which has no prompt of its own, sees that of the document before it.
    """
    part_N = part_BT.ravel()
    key_starts = [0]
    places = []
    before = 0  # where the document before began
    behind = 0
    for start, stop in pairwise(starts_S.tolist()):
        if part_N[start] == OTHER_BRANCH:
            is_trunk = part_N[before:start] == TRUNK
            trunk = before + np.flatnonzero(is_trunk)
            places.append(trunk)
            behind += len(trunk)
        own = np.arange(start, stop)
        places.append(own)
        behind += len(own)
        key_starts.append(behind)
        before = start
    return np.array(key_starts, np.int32), np.concatenate(places)
