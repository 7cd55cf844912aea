"""Examples: what a global batch is made of. One may own several documents, as two answers to one prompt are."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """The examples of a source: number i owns the documents [starts[i], starts[i + 1]) of `tokens`.

    `shared` [documents] says how many tokens a document need not have of its own, where the one before it in the same
    example has them too, and lies before it in the same row.
    """

    tokens: "Tokens"
    starts: Indices  # [examples + 1]
    shared: Indices | None = None

    @classmethod
    def of_each(cls, tokens: "Tokens", documents: int = 1) -> "Examples":
        """Examples of so many documents each, in their order; what is left at the end belongs to none."""
        count = len(tokens.lengths)
        end = count + 1
        starts = np.arange(0, end, documents, dtype=np.int64)
        return cls(tokens, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Indices:
        """The tokens of each example [examples]."""
        return self._sums(self.tokens.lengths)

    @cached_property
    def lengths_in_one_row(self) -> Indices:
        """The tokens of each example [examples] whose documents lie in one row, and share what they can."""
        if self.shared is None:
            return self.lengths
        return self.lengths - self._sums(self.shared)

    @cached_property
    def targets(self) -> Indices:
        """The labels of each example [examples]."""
        return self._sums(self.tokens.targets)

    def documents(self, example: int) -> range:
        """The numbers of the documents that an example owns."""
        start = int(self.starts[example])
        stop = int(self.starts[example + 1])
        return range(start, stop)

    def saved(self, example: int) -> int:
        """How many tokens the documents of an example share, where they lie in one row."""
        apart = self.lengths[example]
        together = self.lengths_in_one_row[example]
        return int(apart - together)

    def first(self, count: int | None) -> "Examples":
        """The first so many examples; all where it is None."""
        if count is None:
            return self
        starts = self.starts[: count + 1]
        return Examples(self.tokens, starts, self.shared)

    def after(self, count: int) -> "Examples":
        """All examples but the first so many."""
        starts = self.starts[count:]
        return Examples(self.tokens, starts, self.shared)

    def _sums(self, of_documents: Indices) -> Indices:
        """For each example, the sum of a number that each of its documents has."""
        up_to = np.cumsum(of_documents)
        before = np.concatenate([[0], up_to])
        before_starts = before[self.starts]
        sums: Indices = before_starts[1:] - before_starts[:-1]
        return sums


@dataclass(frozen=True)
class GlobalBatch:
    """The examples of one step, in the order in which they were chosen; a small source may have one twice."""

    examples: Examples
    chosen: Indices

    @property
    def tokens(self) -> int:
        """Number of its tokens, without padding."""
        lengths = self.examples.lengths[self.chosen]
        return int(lengths.sum())

    @property
    def targets(self) -> int:
        """Number of labels in its documents."""
        targets = self.examples.targets[self.chosen]
        return int(targets.sum())

    def documents(self) -> Iterator[int]:
        """The documents of its examples, one example after the other."""
        for example in self.chosen:
            yield from self.examples.documents(int(example))
