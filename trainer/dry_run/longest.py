"""The documents of a run's longest micro-batch, as far as a sample of their lengths tells."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from runfolder.job import Job
from trainer.data.batches import layout_of
from trainer.data.counts import Counts
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.data.longest import padded_positions
from trainer.data.one_row import deal_in_one_row
from trainer.data.shards import join_examples
from trainer.data.tokens import Tokens

DRAWN = 16  # global batches that are dealt

Lengths = tuple[int, int]  # of a document: its tokens, and how many of them are labels


def longest_micro_batch(job: Job, sample: Sequence[Lengths], in_one_row: bool) -> list[Lengths]:
    """The documents of the micro-batch with the most positions, in global batches that are drawn from a sample.

    Without packing, rows are as long as the longest document among them, which may be the longest of all.
    """
    longest_first = sorted(sample, reverse=True)
    of_example = documents_of_example(job)
    if not job.data.packing and not in_one_row:
        whole_examples = job.train.micro_batch // of_example
        at_least_one = max(1, whole_examples)
        wanted = at_least_one * of_example
        shortest = longest_first[-1]
        repeated = longest_first + [shortest] * wanted
        return repeated[:wanted]
    examples = examples_of(longest_first, job)
    generator = np.random.default_rng(job.train.seed)
    most = 0
    chosen: list[int] = []
    for _ in range(DRAWN):
        batch = _drawn(job, examples, generator)
        dealt = _micro_batches_of(job, batch, in_one_row)
        for micro in dealt:
            positions = padded_positions(micro, examples.tokens)
            if positions > most:
                most = positions
                chosen = list(chain.from_iterable(micro.rows))
    return [longest_first[document] for document in chosen]


def documents_of_example(job: Job) -> int:
    """How many documents an example of a job's objective has: two where answers are compared."""
    if job.objective.rows == "answers":
        return 1
    return 2


def examples_of(documents: Sequence[Lengths], job: Job) -> Examples:
    """Examples of a job from documents of these lengths, whose last tokens are labels; a reference knows nothing.

    Documents of about the same length make a pair, which is as long as any.
    """
    virtual = job.method.virtual_tokens
    made = []
    for length, labels in documents:
        own = max(1, length - virtual)
        ids = np.zeros(own, np.int32)
        target = np.zeros(own, np.bool_)
        target[-labels:] = True
        target[:1] = False
        made.append((ids, target))
    rows = list(range(len(documents)))
    shard = join_examples(made, rows, Counts())
    tokens = Tokens([shard], virtual)
    count = len(tokens)
    tokens.reference = np.zeros(count)
    of_example = documents_of_example(job)
    return Examples.of_each(tokens, of_example)


def _micro_batches_of(job: Job, batch: GlobalBatch, in_one_row: bool) -> list[MicroBatch]:
    """The micro-batches of the first worker, or of the first that share rows, which have the longest."""
    layout = layout_of(job)
    workers = job.data_size
    if in_one_row:
        return deal_in_one_row(layout, batch, 0, workers)
    return layout.deal(batch, 0, workers)


def _drawn(job: Job, examples: Examples, generator: np.random.Generator) -> GlobalBatch:
    """A global batch of the job's size, with examples drawn at random."""
    mean = float(examples.lengths.mean())
    wanted = int(job.train.batch_tokens / mean)
    count = max(1, wanted)
    chosen = generator.integers(len(examples), size=count)
    return GlobalBatch(examples, chosen)
