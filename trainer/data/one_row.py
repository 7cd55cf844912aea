"""Documents of a micro-batch one behind the other in one row, which needs no padding, and where each of them starts.

Shape suffixes: B rows, T positions.
"""

from itertools import chain

import numpy as np

from trainer.data.examples import Indices
from trainer.data.layout import MULTIPLE, MicroBatch

EVERY_ROW = np.zeros(0, np.int32)  # in the place of starts: each row is one document, without padding


def in_one_row(micro: MicroBatch) -> MicroBatch:
    """The same documents in the same order, in one row."""
    documents = chain.from_iterable(micro.rows)
    row = list(documents)
    rows = []
    if row:
        rows.append(row)
    return MicroBatch(rows, micro.examples)


def is_even(micro: MicroBatch, lengths: Indices) -> bool:
    """Whether each row is one document and none is padded, by the lengths of all documents."""
    lengths_of_rows = set()
    for row in micro.rows:
        if len(row) != 1:
            return False
        (document,) = row
        length = int(lengths[document])
        lengths_of_rows.add(length)
    if len(lengths_of_rows) != 1:
        return False
    (length,) = lengths_of_rows
    return bool(length % MULTIPLE == 0)


def starts_of_documents(position_BT: Indices) -> Indices:
    """Where documents start in flattened rows, and where the last ends, by positions that restart: int32."""
    before_BT = np.roll(position_BT, 1, axis=1)
    is_start_BT = position_BT != before_BT + 1
    is_start_BT[:, 0] = True
    starts = np.flatnonzero(is_start_BT)
    with_end = np.append(starts, position_BT.size)
    return with_end.astype(np.int32)
