"""Documents of a micro-batch as arrays: rows one below the other, padded to one length.

Two answers to one prompt may share it: in a row, the second one then goes on from the prompt of the first, of whose
answer it sees nothing. Shape suffixes: B rows of a micro-batch, T positions of its longest row.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainer.data.examples import Indices
from trainer.data.layout import IGNORED, MULTIPLE

if TYPE_CHECKING:
    from trainer.data.tokens import Document, Tokens

DocumentsOfRow = Sequence[int]  # their numbers, in the row's order
TRUNK, BRANCH, OTHER_BRANCH = 0, 1, 2  # parts of a group: what all of it see, and what is apart


class PlacedDocument(NamedTuple):
    """A document, and how many of its first tokens it has in common with the one before it in its row."""

    document: "Document"
    skipped: int


def collate(
    rows: Sequence[DocumentsOfRow],
    tokens: "Tokens",
    pad_id: int,
    shared: Indices | None = None,
) -> dict[str, Indices]:
    """The arrays of a micro-batch's rows, each [B, T]; no rows become one of padding without labels.

    `position_ids` restart in each document and in the padding: by that a model tells documents apart, as long as it
    is given no attention mask. `labels` holds the token at its own position, or -100 where it is not learned.

    Where it is said what documents share, `before` has the place of the token that comes before each one in its
    document, `group` numbers what is apart in a row, and `part` says which part of its group a token is of.
    """
    fills = {"input_ids": pad_id, "labels": IGNORED}
    placed_rows = []
    for row in rows or [[]]:
        placed = list(_placed(row, tokens, shared))
        placed_rows.append(placed)
    B = len(placed_rows)
    T = _padded_length(placed_rows)
    shape = (B, T)
    names = ["input_ids", "position_ids", "labels"]
    if shared is not None:
        names += ["before", "group", "part"]
    arrays = {}
    for name in names:
        value = fills.get(name, 0)
        arrays[name] = np.full(shape, value, np.int64)
    for number, placed in enumerate(placed_rows):
        of_row = {}
        for name, array in arrays.items():
            of_row[name] = array[number]
        _fill(placed, of_row)
        if shared is not None:
            _branch(placed, of_row)
    return arrays


def skipped_in(row: DocumentsOfRow, shared: Indices | None) -> Iterator[int]:
    """How many tokens each document of a row has in common with the one before it, and so need not have again."""
    before = None
    for number in row:
        skipped = 0
        if shared is not None and before == number - 1:
            skipped = int(shared[number])
        yield skipped
        before = number


def shared_by_pairs(tokens: "Tokens") -> Indices:
    """Of each document [documents], how many tokens before its first label the other one of its pair has too.

    Documents 2 i and 2 i + 1 are a pair, of which the second one may do without them.
    """
    count = len(tokens)
    shared = np.zeros(count, np.int64)
    for number in range(1, count, 2):
        first = tokens.document(number - 1)
        second = tokens.document(number)
        shared[number] = _common_beginning(first, second)
    return shared


def _common_beginning(first: "Document", second: "Document") -> int:
    """The number of tokens with which both documents begin, and of which none is a label."""
    first_label = first.target.argmax()
    other_label = second.target.argmax()
    longest = min(first_label, other_label)
    are_equal = first.ids[:longest] == second.ids[:longest]
    if are_equal.all():
        return int(longest)
    return int(are_equal.argmin())


def _placed(row: DocumentsOfRow, tokens: "Tokens", shared: Indices | None) -> Iterator[PlacedDocument]:
    """The documents of a row, with what they share."""
    skipped_in_row = skipped_in(row, shared)
    for number, skipped in zip(row, skipped_in_row, strict=True):
        document = tokens.document(number)
        yield PlacedDocument(document, skipped)


def _fill(row: Iterable[PlacedDocument], arrays: dict[str, Indices]) -> None:
    """Write the documents of a row into its arrays, each [T]."""
    input_ids = arrays["input_ids"]
    position_ids = arrays["position_ids"]
    labels = arrays["labels"]
    start = 0
    for document, skipped in row:
        whole = document.ids
        ids = whole[skipped:]
        length = len(ids)
        stop = start + length
        input_ids[start:stop] = ids
        positions = np.arange(length)
        position_ids[start:stop] = positions + skipped
        whole_target = document.target
        target = whole_target[skipped:]
        learned = np.where(target, ids, IGNORED)
        labels[start:stop] = learned
        start = stop
    padding = len(position_ids) - start
    position_ids[start:] = np.arange(padding)


def _branch(row: Iterable[PlacedDocument], arrays: dict[str, Indices]) -> None:
    """Write into the arrays of a row, each [T], what comes before each token, and which ones it may see."""
    before = arrays["before"]
    group = arrays["group"]
    part = arrays["part"]
    before[:] = np.arange(len(before)) - 1
    start = 0
    first_start = 0  # of the document that the next one may share with
    groups = 0
    for document, skipped in row:
        length = len(document.ids) - skipped
        stop = start + length
        if skipped:
            trunk_stop = first_start + skipped
            part[trunk_stop:start] = BRANCH
            part[start:stop] = OTHER_BRANCH
            before[start] = trunk_stop - 1
        else:
            groups += 1
            first_start = start
        group[start:stop] = groups
        start = stop
    group[start:] = groups + 1


def _padded_length(rows: Iterable[Iterable[PlacedDocument]]) -> int:
    """T for rows of documents: a multiple of 8, and never 0."""
    longest = 1
    for row in rows:
        length = 0
        for document, skipped in row:
            own = len(document.ids) - skipped
            length += own
        longest = max(longest, length)
    multiples = math.ceil(longest / MULTIPLE)
    return multiples * MULTIPLE
