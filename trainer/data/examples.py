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
    """The examples of a source: number i owns the documents [starts[i], starts[i + 1]) of `tokens`."""

    tokens: "Tokens"
    starts: Indices  # [examples + 1]

    @classmethod
    def of_each(cls, tokens: "Tokens", documents: int = 1) -> "Examples":
        """Examples of so many documents each, in their order; what is left at the end belongs to none."""
        return cls(tokens, np.arange(0, len(tokens.lengths) + 1, documents, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Indices:
        """The tokens of each example [examples]."""
        return self._sums(self.tokens.lengths)

    @cached_property
    def targets(self) -> Indices:
        """The labels of each example [examples]."""
        return self._sums(self.tokens.targets)

    def documents(self, example: int) -> range:
        """The documents of an example."""
        return range(int(self.starts[example]), int(self.starts[example + 1]))

    def first(self, count: int | None) -> "Examples":
        """The first so many examples; all where it is None."""
        return self if count is None else Examples(self.tokens, self.starts[: count + 1])

    def _sums(self, of_documents: Indices) -> Indices:
        before = np.concatenate([[0], np.cumsum(of_documents)])
        sums: Indices = before[self.starts[1:]] - before[self.starts[:-1]]
        return sums


@dataclass(frozen=True)
class GlobalBatch:
    """The examples of one step, in the order in which they were chosen; a small source may have one twice."""

    examples: Examples
    chosen: Indices

    @property
    def tokens(self) -> int:
        """Number of its tokens, without padding."""
        return int(self.examples.lengths[self.chosen].sum())

    @property
    def targets(self) -> int:
        """Number of its labels."""
        return int(self.examples.targets[self.chosen].sum())

    def documents(self) -> Iterator[int]:
        """Its documents, example by example."""
        for example in self.chosen:
            yield from self.examples.documents(int(example))
