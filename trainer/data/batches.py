"""Which examples make which global batch, and how a batch becomes arrays: pure functions of the job and the step.

A global batch is a set of examples that (seed, k) alone decides; packing, micro-batches and the number of ranks only
decide where each of them is computed. Shape suffixes: B rows of a micro-batch, T positions of its longest row.
"""

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from runfolder.job import Job
    from trainer.data.tokens import Tokens

Indices = npt.NDArray[np.int64]
MicroBatch = list[list[int]]  # rows, each a list of examples that share one sequence

IGNORED = -100
_MULTIPLE = 8


class Batches:
    """The global batches k = 0 ... steps - 1 of a run.

    An endless stream, each epoch the permutation of the examples that (seed, epoch) gives, is cut so that a batch
    takes examples as long as they fit into `batch_tokens` (at least one). It ends after `steps` batches, or after
    round(epochs x examples) examples.
    """

    def __init__(
        self,
        lengths: Indices,
        targets: Indices,
        *,
        seed: int,
        seq_len: int,
        batch_tokens: int,
        packing: bool,
        micro_batch: int,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        self._lengths, self._targets = lengths, targets
        self._seed, self._seq_len, self._batch_tokens = seed, seq_len, batch_tokens
        self._packing, self._micro_batch = packing, micro_batch
        self._epoch = lru_cache(maxsize=4)(self._permute)
        if (steps is None) == (epochs is None):
            raise ValueError("give either steps or epochs")
        limit = sys.maxsize if epochs is None else max(1, round(epochs * len(lengths)))
        self._starts = self._cut(sys.maxsize if steps is None else steps, limit)
        self.steps = len(self._starts) - 1

    @classmethod
    def of(cls, job: "Job", tokens: "Tokens") -> "Batches":
        """The global batches that a job and its data fix."""
        return cls(
            tokens.lengths,
            tokens.targets,
            seed=job.train.seed,
            seq_len=job.data.seq_len,
            batch_tokens=job.train.batch_tokens,
            packing=job.data.packing,
            micro_batch=job.train.micro_batch,
            steps=job.train.steps,
            epochs=job.train.epochs,
        )

    def examples(self, k: int) -> Indices:
        """The examples of batch k, in the order of the stream."""
        size = len(self._lengths)
        start, end = self._starts[k], self._starts[k + 1]
        parts = []
        for epoch in range(start // size, (end - 1) // size + 1):
            order, _ = self._epoch(epoch)
            parts.append(order[max(start - epoch * size, 0) : end - epoch * size])
        return np.concatenate(parts)

    def tokens(self, k: int) -> int:
        """Number of tokens of batch k, without padding."""
        return int(self._lengths[self.examples(k)].sum())

    def target_tokens(self, k: int) -> int:
        """Number of labels of batch k: what its loss is divided by."""
        return int(self._targets[self.examples(k)].sum())

    def deal(self, k: int, rank: int, world: int) -> list[MicroBatch]:
        """The micro-batches of one rank in step k: the same number on every rank, some of them perhaps empty.

        Rows are dealt from the longest to the shortest, forth and back over the ranks, so that the ranks have about
        the same tokens, and rows of about the same length at the same time.
        """
        rows = self._rows(self.examples(k))
        mine = [rows[i] for i in range(len(rows)) if _dealt_to(i, world) == rank]
        largest = -(-len(rows) // world)
        return [mine[i : i + self._micro_batch] for i in range(0, largest, self._micro_batch)]

    def _permute(self, epoch: int) -> tuple[Indices, Indices]:
        """The order of the examples in an epoch, and the tokens before each of them (and in all)."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
        return order, np.concatenate([[0], np.cumsum(self._lengths[order])])

    def _cut(self, steps: int, limit: int) -> list[int]:
        """Where each batch starts in the stream, and where the last one ends."""
        starts = [0]
        while len(starts) <= steps and starts[-1] < limit:
            starts.append(min(self._end(starts[-1]), limit))
        return starts

    def _end(self, start: int) -> int:
        size, room = len(self._lengths), self._batch_tokens
        epoch, offset = divmod(start, size)
        while True:
            _, before = self._epoch(epoch)
            stop = int(np.searchsorted(before, before[offset] + room, side="right")) - 1
            if stop < size:
                return max(epoch * size + stop, start + 1)
            room -= int(before[size] - before[offset])
            epoch, offset = epoch + 1, 0

    def _rows(self, examples: Indices) -> list[list[int]]:
        """The rows of a batch, longest first."""
        lengths = self._lengths[examples]
        longest_first = np.argsort(-lengths, kind="stable")
        examples, lengths = examples[longest_first], lengths[longest_first]
        if not self._packing:
            return [[int(example)] for example in examples]
        rows, used = _pack(examples, lengths, self._seq_len)
        return [rows[i] for i in np.argsort(-used, kind="stable")]


def _dealt_to(index: int, world: int) -> int:
    turn, place = divmod(index, world)
    return place if turn % 2 == 0 else world - 1 - place


def _pack(examples: Indices, lengths: Indices, seq_len: int) -> tuple[list[list[int]], Indices]:
    """Put each example, longest first, into the first row that has room; rows, and the tokens of each."""
    rows: list[list[int]] = []
    free = np.full(len(examples), seq_len)
    for example, length in zip(examples.tolist(), lengths.tolist(), strict=True):
        row = int(np.argmax(free[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        free[row] -= length
    return rows, seq_len - free[: len(rows)]


def collate(micro: MicroBatch, tokens: "Tokens", pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """The arrays of a micro-batch, each [B, T]; an empty one becomes a row of padding without labels.

    `position_ids` restart in each example and in the padding: by that a model tells documents apart, as long as it is
    given no attention mask. `labels` holds the token at its own position, or -100 where it is not learned.
    """
    rows = [[tokens.example(index) for index in row] for row in micro] or [[]]
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    shape = len(rows), max(1, -(-longest // _MULTIPLE)) * _MULTIPLE
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids, labels = np.zeros_like(input_ids), np.full(shape, IGNORED, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for example in row:
            part = slice(at, at := at + len(example.ids))
            input_ids[b, part] = example.ids
            position_ids[b, part] = np.arange(len(example.ids))
            labels[b, part] = np.where(example.target, example.ids, IGNORED)
        position_ids[b, at:] = np.arange(shape[1] - at)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
