"""The longest micro-batch of a run: the one whose pass takes the most memory."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.batches import Batches
from trainer.data.examples import GlobalBatch
from trainer.data.layout import MULTIPLE, MicroBatch

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

DEALT = 4  # batches that are dealt, for each way in which one may be the largest
LOOKED_AT = 50_000  # batches that are looked at, at even distances; all where a run has fewer

DealBatch = Callable[[GlobalBatch], list[MicroBatch]]  # the micro-batches of this rank


@dataclass(frozen=True)
class LongestPass:
    """A micro-batch of this rank, and the global batch that it is of."""

    batch: GlobalBatch
    micro: MicroBatch

    @property
    def size(self) -> tuple[int, int]:
        """What passes are compared by: positions with padding, then labels."""
        tokens = self.batch.examples.tokens
        labels = 0
        for row in self.micro.rows:
            of_documents = tokens.targets[row]
            labels += int(of_documents.sum())
        positions = padded_positions(self.micro, tokens)
        return positions, labels

    def __str__(self) -> str:
        positions, _ = self.size
        rows = _row_number(self.micro)
        of_row = positions // rows
        return f"{rows} x {of_row:,} positions"


def longest_pass(batches: Batches, first: int, deal: DealBatch) -> LongestPass:
    """This rank's longest micro-batch in the steps after `first`, of which there must be one."""
    found = []
    for k in _large_batches(batches, first):
        batch = batches.batch(k)
        for micro in deal(batch):
            candidate = LongestPass(batch, micro)
            found.append(candidate)
    return max(found, key=lambda candidate: candidate.size)


def padded_positions(micro: MicroBatch, tokens: "Tokens") -> int:
    """The positions of a micro-batch, with padding."""
    longest = 1
    for row in micro.rows:
        lengths = tokens.lengths[row]
        length = int(lengths.sum())
        longest = max(longest, length)
    multiples = ceil(longest / MULTIPLE)
    rows = _row_number(micro)
    return rows * multiples * MULTIPLE


def _row_number(micro: MicroBatch) -> int:
    """How many rows are computed: one of padding where there are none."""
    rows = len(micro.rows)
    return max(1, rows)


def _large_batches(batches: Batches, first: int) -> list[int]:
    """The batches that have the longest example, the most tokens, or the most labels; every rank finds the same."""
    left = batches.steps - first
    stride = max(1, left // LOOKED_AT)
    numbers = range(first, batches.steps, stride)
    sizes = []
    for k in numbers:
        batch = batches.batch(k)
        lengths = batch.examples.lengths[batch.chosen]
        longest = int(lengths.max())
        sizes.append((longest, batch.tokens, batch.targets))
    by_kind = np.array(sizes).T
    chosen: set[int] = set()
    for of_one_kind in by_kind:
        largest_first = np.argsort(-of_one_kind, kind="stable")
        largest = largest_first[:DEALT]
        chosen.update(largest.tolist())
    return [numbers[place] for place in sorted(chosen)]
