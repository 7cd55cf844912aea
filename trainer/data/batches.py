"""Which examples make which global batch: a pure function of the job and the step.

A global batch is a set of examples that (seed, k) alone decides; its layout (packing, micro-batches and the number of
ranks) only decides where each of them is computed.
"""

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.examples import Examples, GlobalBatch, Indices
from trainer.data.layout import Layout, MicroBatch

if TYPE_CHECKING:
    from runfolder.job import Job


class Batches:
    """The global batches k = 0 ... steps - 1 of a run.

    An endless stream, each epoch the permutation of the examples that (seed, epoch) gives, is cut so that a batch
    takes examples as long as they fit into `batch_tokens` (at least one). It ends after `steps` batches, or after
    round(epochs x examples) examples.
    """

    def __init__(
        self,
        examples: Examples,
        layout: Layout,
        *,
        seed: int,
        batch_tokens: int,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        self._examples, self.layout = examples, layout
        self._seed, self._batch_tokens = seed, batch_tokens
        self._epoch = lru_cache(maxsize=4)(self._permute)
        if (steps is None) == (epochs is None):
            raise ValueError("give either steps or epochs")
        limit = sys.maxsize if epochs is None else max(1, round(epochs * len(examples)))
        self._starts = self._cut(sys.maxsize if steps is None else steps, limit)
        self.steps = len(self._starts) - 1

    @classmethod
    def of(cls, job: "Job", examples: Examples) -> "Batches":
        """The global batches that a job and its data fix."""
        train = job.train
        return cls(
            examples,
            layout_of(job),
            seed=train.seed,
            batch_tokens=train.batch_tokens,
            steps=train.steps,
            epochs=train.epochs,
        )

    def batch(self, k: int) -> GlobalBatch:
        """Batch k."""
        return GlobalBatch(self._examples, self.examples(k))

    def examples(self, k: int) -> Indices:
        """The examples of batch k, in the order of the stream."""
        size = len(self._examples)
        start, end = self._starts[k], self._starts[k + 1]
        parts = []
        for epoch in range(start // size, (end - 1) // size + 1):
            order, _ = self._epoch(epoch)
            parts.append(order[max(start - epoch * size, 0) : end - epoch * size])
        return np.concatenate(parts)

    def deal(self, k: int, rank: int, world: int) -> list[MicroBatch]:
        """The micro-batches of one rank in step k: the same number on every rank, some of them perhaps empty."""
        return self.layout.deal(self.batch(k), rank, world)

    def _permute(self, epoch: int) -> tuple[Indices, Indices]:
        """The order of the examples in an epoch, and the tokens before each of them (and in all)."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
        return order, np.concatenate([[0], np.cumsum(self._examples.lengths[order])])

    def _cut(self, steps: int, limit: int) -> list[int]:
        """Where each batch starts in the stream, and where the last one ends."""
        starts = [0]
        while len(starts) <= steps and starts[-1] < limit:
            starts.append(min(self._end(starts[-1]), limit))
        return starts

    def _end(self, start: int) -> int:
        size, room = len(self._examples), self._batch_tokens
        epoch, offset = divmod(start, size)
        while True:
            _, before = self._epoch(epoch)
            stop = int(np.searchsorted(before, before[offset] + room, side="right")) - 1
            if stop < size:
                return max(epoch * size + stop, start + 1)
            room -= int(before[size] - before[offset])
            epoch, offset = epoch + 1, 0


def layout_of(job: "Job") -> Layout:
    """How a job lays out its batches."""
    return Layout(job.data.seq_len, job.data.packing, job.train.micro_batch)
