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
        self.layout = layout
        self._examples = examples
        self._seed = seed
        self._batch_tokens = batch_tokens
        self._epoch = lru_cache(maxsize=4)(self._permute)
        if (steps is None) == (epochs is None):
            raise ValueError("give either steps or epochs")
        most_steps = most_examples = sys.maxsize
        if steps is not None:
            most_steps = steps
        if epochs is not None:
            whole = round(epochs * len(examples))
            most_examples = max(1, whole)
        self._starts = self._cut(most_steps, most_examples)
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
        """The examples of batch k, with their tokens."""
        chosen = self.examples(k)
        return GlobalBatch(self._examples, chosen)

    def examples(self, k: int) -> Indices:
        """The examples of batch k, in the order of the stream."""
        size = len(self._examples)
        starts = self._starts
        start = starts[k]
        end = starts[k + 1]
        first_epoch = start // size
        last_epoch = (end - 1) // size
        parts = []
        for epoch in range(first_epoch, last_epoch + 1):
            order, _ = self._epoch(epoch)
            before = epoch * size  # examples of earlier epochs
            first = max(start - before, 0)
            part = order[first : end - before]
            parts.append(part)
        return np.concatenate(parts)

    def all_examples(self) -> Indices:
        """Every example of any batch, each once."""
        parts = []
        for k in range(self.steps):
            chosen = self.examples(k)
            parts.append(chosen)
        together = np.concatenate(parts)
        return np.unique(together)

    def deal(self, k: int, rank: int, world_size: int) -> list[MicroBatch]:
        """The micro-batches of one rank in step k: the same number on every rank, some of them perhaps empty."""
        layout = self.layout
        batch = self.batch(k)
        return layout.deal(batch, rank, world_size)

    def _permute(self, epoch: int) -> tuple[Indices, Indices]:
        """The order of the examples in an epoch, and the tokens before each of them (and in all)."""
        seed = [self._seed, epoch]
        rng = np.random.default_rng(seed)
        count = len(self._examples)
        order = rng.permutation(count)
        lengths = self._examples.lengths[order]
        up_to = np.cumsum(lengths)
        before = np.concatenate([[0], up_to])
        return order, before

    def _cut(self, most_steps: int, most_examples: int) -> list[int]:
        """Where each batch starts in the stream, and where the last one ends."""
        starts = [0]
        end = 0
        while len(starts) <= most_steps and end < most_examples:
            end = self._end(end)
            end = min(end, most_examples)
            starts.append(end)
        return starts

    def _end(self, start: int) -> int:
        """Where in the stream the batch ends that starts at `start`; it may reach into later epochs."""
        size = len(self._examples)
        space = self._batch_tokens
        epoch, offset = divmod(start, size)
        while True:
            _, before = self._epoch(epoch)
            full = before[offset] + space
            behind = int(np.searchsorted(before, full, side="right"))
            stop = behind - 1  # of the epoch's examples, those before it fit
            if stop < size:
                end = epoch * size + stop
                return max(end, start + 1)
            taken = before[size] - before[offset]
            space -= int(taken)
            epoch += 1
            offset = 0


def layout_of(job: "Job") -> Layout:
    """How a job lays out its batches."""
    data = job.data
    train = job.train
    return Layout(data.seq_len, data.packing, train.micro_batch)
