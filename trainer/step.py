"""One step: what comes before the first backward pass of a global batch, its gradients, and the update."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from trainer import rollouts
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.data.one_row import deal_in_one_row, gathered_keys, starts_of_documents
from trainer.data.parts import part_of_rows
from trainer.meter import Meter, SaveRequest
from trainer.objectives.base import HostArrays, Shares, TensorsByName, Totals
from trainer.run import Run

ItemT = TypeVar("ItemT")
BatchTensors = dict[str, torch.Tensor]
NamedSums = dict[str, torch.Tensor]  # over micro-batches; each 0-d
Feed = Callable[[GlobalBatch], Iterator[BatchTensors]]  # from a step's global batch to this rank's micro-batches


class StepTaken(NamedTuple):
    """What a step came to on this rank: its shares of sums, the gradient's norm, and what it was made of."""

    sums: "Sums"
    norm: torch.Tensor
    lr: float
    tokens: int
    wait_s: float


def take_step(run: Run, step: int, feed: Feed, meter: Meter, request: SaveRequest) -> SaveRequest:
    """Take a step and report it; gives what all ranks ask for, perhaps late."""
    done = apply_step(run, step, feed)
    sums = done.sums
    loss = sums.loss
    metrics = sums.metrics
    return meter.record(step, loss, metrics, done.norm, done.lr, done.tokens, done.wait_s, request)


def apply_step(run: Run, step: int, feed: Feed, factor: float = 1.0) -> StepTaken:
    """Accumulate the micro-batches of one global batch and apply them, at `factor` times the scheduled rate."""
    objective = run.objective
    sharded = run.sharded
    world = run.world
    settings = run.job.train
    number = step - 1
    global_batch = run.batches.batch(number)
    sums = Sums(world.device)
    if objective.generates:
        began = time.monotonic()
        global_batch = rollouts.rolled_out(run, step, feed)
        sums.add_mean("rollout_s", time.monotonic() - began)
    seed = hash((settings.seed, step, world.rank))
    torch.manual_seed(seed)
    stream = feed(global_batch)
    timed = TimedIterator(stream)
    totals = objective.totals(global_batch)
    passes, known = prepared(run, timed, totals)
    for batch in passes:
        of_rows = objective.loss(sharded.engine, batch, totals, known)
        shares = of_rows.of_one(world.sequence.size)
        sharded.backward(shares.loss)
        sums.add(shares)
    if objective.generates:
        logged = reduced(sums.metrics)
        metrics = {name: float(value) for name, value in logged.items()}
        objective.check_step(step, metrics)
    scheduled = run.schedule(number)
    lr = factor * scheduled
    norm = sharded.step(lr, settings.clip, number)
    return StepTaken(sums, norm, lr, global_batch.tokens, timed.seconds)


def prepared(
    run: Run, passes: Iterable[BatchTensors], totals: Totals
) -> tuple[Iterable[BatchTensors], TensorsByName]:
    """The micro-batches of a global batch, and what the loss needs to know of all of them; every rank calls it."""
    objective = run.objective
    if not objective.has_prelude:
        return passes, {}
    batches = list(passes)
    sums: NamedSums = {}
    with torch.no_grad():
        for batch in batches:
            shares = objective.prelude(run.model, batch, totals)
            add_shares(sums, shares)
    ranks = run.world.sequence.size
    known = {}
    for name, total in reduced(sums).items():
        known[name] = total / ranks
    return batches, known


class Sums:
    """The shares of the micro-batches so far, fp64."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), device=device, dtype=torch.float64)
        self.loss = zero
        self.metrics: NamedSums = {}

    def add(self, shares: Shares) -> None:
        """Add the shares of another micro-batch, without their gradients."""
        loss = shares.loss.detach()
        self.loss += loss
        add_shares(self.metrics, shares.metrics)

    def add_mean(self, name: str, value: float) -> None:
        """Add a metric of this rank, of which the mean over ranks is reported."""
        world_size = dist.get_world_size()
        share = value / world_size
        self.metrics[name] = self.loss.new_tensor(share)


def add_shares(sums: NamedSums, shares: TensorsByName) -> None:
    """Add shares to sums by name, in fp64."""
    for name, share in shares.items():
        so_far = sums.get(name, 0)
        value = share.detach()
        sums[name] = so_far + value.double()


def reduced(sums: TensorsByName) -> NamedSums:
    """The sums of all ranks by name; a collective, in which all have the same names."""
    names = sorted(sums)
    values = [sums[name] for name in names]
    stacked = torch.stack(values)
    dist.all_reduce(stacked)
    named = zip(names, stacked, strict=True)
    return dict(named)


def feed(run: Run, first: int) -> Feed:
    """Where the micro-batches of the steps after `first` come from: made ahead, unless they wait for a rollout."""
    if run.objective.generates:
        return partial(micro_batches, run)
    micro_batches_of_rank = _micro_batches_after(run, first)
    stream = prefetch(micro_batches_of_rank)
    take = partial(next, stream)

    def until_step_ends(_: GlobalBatch) -> Iterator[BatchTensors]:
        return iter(take, None)

    return until_step_ends


def micro_batches(run: Run, global_batch: GlobalBatch) -> Iterator[BatchTensors]:
    """This rank's micro-batches of a global batch."""
    for micro in dealt_to_rank(run, global_batch):
        yield micro_batch_tensors(run, global_batch.examples, micro)


def dealt_to_rank(run: Run, global_batch: GlobalBatch) -> list[MicroBatch]:
    """Which documents this rank computes of a global batch, alone or with its neighbours, by micro-batch."""
    world = run.world
    layout = run.batches.layout
    if run.objective.kernels.in_one_row:
        return deal_in_one_row(layout, global_batch, world.data_rank, world.data_size)
    return layout.deal(global_batch, world.data_rank, world.data_size)


def micro_batch_tensors(run: Run, examples: Examples, micro: MicroBatch) -> BatchTensors:
    """What the objective reads of a micro-batch, on this rank's device."""
    device = run.world.device
    objective = run.objective
    arrays = objective.arrays(examples, micro)
    if objective.kernels.in_one_row:
        arrays = with_starts(arrays)
    sequence = run.world.sequence
    if sequence.size > 1:
        arrays = part_of_rows(arrays, sequence.index, sequence.size)
    batch = {}
    for name, array in arrays.items():
        batch[name] = to_device(array, device)
    return batch


def with_starts(arrays: HostArrays) -> HostArrays:
    """Arrays, and beside all position_ids the starts of documents, by which attention keeps them apart in one row."""
    completed = dict(arrays)
    for name, array in arrays.items():
        if name.endswith("position_ids"):
            prefix = name.removesuffix("position_ids")
            starts = starts_of_documents(array)
            completed[prefix + "documents"] = starts
            part = arrays.get(prefix + "part")
            if part is not None and len(starts):
                key_starts, key_places = gathered_keys(starts, part)
                completed[prefix + "key_starts"] = key_starts
                completed[prefix + "key_places"] = key_places
    return completed


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device, copied without a wait where that is possible."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    pinned = tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def prefetch(stream: Iterator[BatchTensors | None], ahead: int = 4) -> Iterator[BatchTensors | None]:
    """The same stream, made ahead in a thread; raises what the thread raised."""
    ready: queue.Queue[BatchTensors | BaseException | None] = queue.Queue(ahead)

    def work() -> None:
        try:
            for item in stream:
                ready.put(item)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while True:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item


class TimedIterator(Generic[ItemT]):
    """An iterator that knows for how many seconds its user has waited for items."""

    def __init__(self, items: Iterator[ItemT]) -> None:
        self._items = items
        self.seconds = 0.0

    def __iter__(self) -> "TimedIterator[ItemT]":
        return self

    def __next__(self) -> ItemT:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            waited = time.monotonic() - began
            self.seconds += waited


def _micro_batches_after(run: Run, first: int) -> Iterator[BatchTensors | None]:
    """This rank's micro-batches of all steps after `first`; None ends a step."""
    batches = run.batches
    for k in range(first, batches.steps):
        global_batch = batches.batch(k)
        yield from micro_batches(run, global_batch)
        yield None
