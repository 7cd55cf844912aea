"""Two steps, of one and two micro-batches, on tensors without values, and the worst moment of each of their phases.

From the second micro-batch on, gradients stand beside activations; from the second step on, the optimizer's moments
do too. So the second micro-batch of the second step is the one that counts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode

from methods.base import Method, Setup
from methods.options.base import BaseConfig
from methods.parts.peft_adapter import base_under
from methods.registry import create
from runfolder.job import Job
from trainer.data.encode import Reading
from trainer.data.examples import GlobalBatch
from trainer.data.layout import Layout
from trainer.data.one_row import deal_in_one_row, starts_of_documents
from trainer.data.parts import part_of_rows
from trainer.dry_run.four_bits import hold_in_4_bits, in_16_bits, is_in_4_bits
from trainer.dry_run.kernels import LayerTracer, fast_kernels
from trainer.dry_run.ledger import Bytes, Ledger
from trainer.dry_run.longest import Lengths, examples_of
from trainer.dry_run.model import attached, fake_weights
from trainer.dry_run.stand_ins import stand_ins
from trainer.embeddings import vocabulary
from trainer.kernels import Kernels
from trainer.objectives.base import HostArrays, Objective, ObjectiveSetup, Totals
from trainer.objectives.registry import create_objective
from trainer.shared_rows.attention import share_rows
from trainer.shared_rows.group import OWN_ROWS, SequenceGroup
from trainer.speed import count_trained
from trainer.zero.by_layer import largest_layer
from trainer.zero.engine import Alone, is_not_resident
from trainer.zero.linear import shard_linears
from trainer.zero.sharded import ShardedModel

MICRO_BATCHES = (1, 2)  # of each step
STEPS_OF_RUN = 1000  # more than are tried: what a method does at its end is not


@dataclass(frozen=True)
class FakeTokenizer:
    """What methods and objectives ask of a tokenizer where no value matters."""

    pad_token_id: int = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        """An id for each character."""
        return {"input_ids": [0] * len(text)}


@dataclass(frozen=True)
class Passes:
    """What is tried: a job on a base of some config, the documents of a micro-batch, and whether it is fast."""

    job: Job
    documents: Sequence[Lengths]
    dtype: torch.dtype
    fast: bool


@dataclass(frozen=True)
class TriedPasses:
    """What came of it: bytes by what they are for in the worst moment of each phase, and elements of the weights."""

    moments: dict[str, Bytes]
    trained: int
    frozen: int
    held: int = 0  # bytes in 4 bits
    of_layer: int = 0  # elements of the largest layer
    of_head: int = 0  # elements of a head that the loss computes with
    base_is_frozen: bool = False


class DryRun:
    """A job's passes, on bases of several depths; what was compiled for the layers of one serves the others."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tracer = LayerTracer()

    def on(self, config: BaseConfig) -> TriedPasses:
        """What the job holds on a base of this config.json."""
        passes = self._passes
        job = passes.job
        packed = is_in_4_bits(job, config)
        plain = config
        if packed:
            job, plain = in_16_bits(job, config)
            passes = replace(passes, job=job)
        tokenizer = FakeTokenizer()
        train = job.train
        masters = train.master_weights
        setup = Setup(STEPS_OF_RUN, train.seed, job.data.seq_len, tokenizer, master_weights=masters)
        method = create(job.method, setup)
        model, base_is_frozen = attached(job, plain, method, passes.dtype)
        held = 0
        if packed:
            held = hold_in_4_bits(model, self._passes.job, config)
        ledger = Ledger(vocabulary(model.config))
        with alone(), self._mode, ledger:
            fake_weights(model)
            method.initialise(model, iter(()))
            kernels = Kernels()
            if passes.fast:
                self._tracer.ledger = ledger
                kernels = fast_kernels(job, model, method, passes.dtype, self._tracer)
            _take_steps(passes, method, model, ledger, kernels)
        trained = count_trained(model)
        weights = sum(parameter.numel() for parameter in model.parameters())
        of_layer = largest_layer(model)
        of_head = _elements_of_head(model, kernels, base_is_frozen)
        return TriedPasses(ledger.peaks, trained, weights - trained, held, of_layer, of_head, base_is_frozen)


def _elements_of_head(model: nn.Module, kernels: Kernels, base_is_frozen: bool) -> int:
    """The elements of a head that is gathered by itself: for the loss, or as a module outside of frozen layers."""
    if kernels.head:
        return kernels.head.elements
    head = base_under(model).get_output_embeddings()
    if head is None or not base_is_frozen:
        return 0
    weight: torch.Tensor = head.weight
    return weight.numel()


def _take_steps(
    passes: Passes,
    method: Method[Any],
    model: nn.Module,
    ledger: Ledger,
    kernels: Kernels,
) -> None:
    """Take the steps, each phase under its name."""
    job = passes.job
    objective = _objective(job, method, kernels)
    batch = _global_batch(passes)
    of_rows = _micro_batch(objective, passes, batch, kernels.in_one_row)
    arrays, group = _of_rank(of_rows, job.sharding.sequence)
    objective.kernels = replace(kernels, sequence=group)
    share_rows(base_under(model), group)
    totals = objective.totals(batch)
    tensors = {}
    for name, array in arrays.items():
        dtype = torch.from_numpy(array).dtype
        tensors[name] = torch.empty(array.shape, dtype=dtype)
    _watch_gradients(model, ledger)
    # On a GPU, AdamW takes many weights at once by itself.
    implementation = "fused" if kernels.fused_step else "foreach"
    adam = {implementation: True}
    if job.sharding.zero == 3:
        shard_linears(model, is_not_resident)
    with stand_ins(of_rows["position_ids"]):
        sharded = ShardedModel(model, method, 0, job.lr, adam, Alone, job.sharding.offloads)
        _count_moments(sharded, ledger)
        for count in MICRO_BATCHES:
            for _ in range(count):
                _one_pass(sharded, objective, tensors, totals, ledger)
            with ledger.phase("step", "optimizer"):
                sharded.step(job.lr, job.train.clip)


def _count_moments(sharded: ShardedModel, ledger: Ledger) -> None:
    """Count moments that are there before the first step, where they are on the device."""
    chunked = sharded.chunked
    if chunked is None:
        return
    if chunked.on_host:
        ledger.leave_out(chunked.moments)
    else:
        ledger.count(chunked.moments, "optimizer")


def _objective(job: Job, method: Method[Any], kernels: Kernels) -> Objective:
    """The job's objective, which reads no data here."""
    tokenizer = FakeTokenizer()
    reading = cast(Reading, None)
    folder = Path()
    setup = ObjectiveSetup(job, tokenizer, reading, folder, lambda _: None)
    objective = create_objective(setup)
    objective.method = method
    objective.kernels = kernels
    return objective


def _one_pass(
    sharded: ShardedModel, objective: Objective, tensors: dict[str, torch.Tensor], totals: Totals, ledger: Ledger
) -> None:
    """One forward and one backward pass, and what the loss has to know before."""
    known: dict[str, torch.Tensor] = {}
    if objective.has_prelude:
        with torch.no_grad(), ledger.phase("prelude", "activations"):
            for name, share in objective.prelude(sharded.model, tensors, totals).items():
                known[name] = share.double()
    with ledger.phase("forward", "activations"):
        shares = objective.loss(sharded.engine, tensors, totals, known)
    with ledger.phase("backward", "activations"):
        sharded.backward(shares.loss)


def _global_batch(passes: Passes) -> GlobalBatch:
    """A global batch that is the micro-batch."""
    examples = examples_of(passes.documents, passes.job)
    count = len(examples)
    chosen = np.arange(count)
    return GlobalBatch(examples, chosen)


def _micro_batch(objective: Objective, passes: Passes, batch: GlobalBatch, in_one_row: bool) -> HostArrays:
    """The arrays of the micro-batch, as the trainer lays it out."""
    examples = batch.examples
    data = passes.job.data
    documents = len(passes.documents)
    rows = max(1, documents)
    layout = Layout(data.seq_len, data.packing, rows)
    if not in_one_row:
        dealt = layout.deal(batch, 0, 1)
        return objective.arrays(examples, dealt[0])
    dealt = deal_in_one_row(layout, batch, 0, 1)
    of_objective = objective.arrays(examples, dealt[0])
    position_BT = of_objective["position_ids"]
    starts = starts_of_documents(position_BT)
    return {**of_objective, "documents": starts}


def _of_rank(of_rows: HostArrays, sequence: int) -> tuple[HostArrays, SequenceGroup]:
    """Of the ranks that share rows, the arrays of the one with the most labels, and what it is in its group."""
    if sequence == 1:
        return of_rows, OWN_ROWS
    most = 0
    for index in range(sequence):
        part = part_of_rows(of_rows, index, sequence)
        labels = len(part["row"])
        if labels > most:
            most = labels
            arrays = part
            group = SequenceGroup(sequence, index)
    return arrays, group


def _watch_gradients(model: nn.Module, ledger: Ledger) -> None:
    """Have the gradients of trained weights counted as such."""

    def count(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            ledger.count(parameter.grad, "gradients")

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count)


@contextmanager
def alone() -> Iterator[None]:
    """Within it, this process is the only one of its group."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
