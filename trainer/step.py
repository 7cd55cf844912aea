"""One step: what comes before the first backward pass of a global batch, its gradients, and the update."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from trainer import rollouts
from trainer.data.examples import GlobalBatch
from trainer.meter import Meter, Wish
from trainer.objectives.base import Shares, Tensors, Totals
from trainer.run import Run

T = TypeVar("T")
Batch = dict[str, torch.Tensor]
Feed = Callable[[GlobalBatch], Iterator[Batch]]  # from a step's global batch to this rank's micro-batches


def take_step(run: Run, step: int, feed: Feed, meter: Meter, wish: Wish) -> Wish:
    """Accumulate the micro-batches of one global batch and apply them; gives what rank 0 wishes, perhaps late."""
    global_batch = run.batches.batch(step - 1)
    if run.objective.generates:
        global_batch = rollouts.rolled_out(run, step, global_batch)
    torch.manual_seed(hash((run.job.train.seed, step, run.world.rank)))
    waited = Waited(feed(global_batch))
    totals = run.objective.totals(global_batch)
    passes, known = prepared(run, waited, totals)
    sums = Sums(run.world.device)
    for batch in passes:
        shares = run.objective.loss(run.shards.engine, batch, totals, known)
        run.shards.backward(shares.loss)
        sums.add(shares)
    lr = run.schedule(step - 1)
    norm = run.shards.step(lr, run.job.train.clip)
    return meter.record(step, sums.loss, sums.figures, norm, lr, global_batch.tokens, waited.seconds, wish)


def prepared(run: Run, passes: Iterable[Batch], totals: Totals) -> tuple[Iterable[Batch], Tensors]:
    """The micro-batches of a global batch, and what the loss needs to know of all of them; every rank calls it."""
    if not run.objective.has_prelude:
        return passes, {}
    batches = list(passes)
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            add(sums, run.objective.prelude(run.model, batch, totals))
    return batches, reduced(sums)


class Sums:
    """The shares of the micro-batches so far, fp64."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.figures: dict[str, torch.Tensor] = {}

    def add(self, shares: Shares) -> None:
        """Add those of another micro-batch."""
        self.loss += shares.loss.detach()
        add(self.figures, shares.figures)


def add(sums: dict[str, torch.Tensor], shares: Mapping[str, torch.Tensor]) -> None:
    """Add shares to sums by name, in fp64."""
    for name, share in shares.items():
        sums[name] = sums.get(name, 0) + share.detach().double()


def reduced(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of all ranks by name; a collective, in which all have the same names."""
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values, strict=True))


def feed(run: Run, first: int) -> Feed:
    """Where the micro-batches of the steps after `first` come from: made ahead, unless they wait for a rollout."""
    if run.objective.generates:
        return partial(micro_batches, run)
    stream = prefetch(_stream(run, first))
    return lambda _: iter(partial(next, stream), None)


def micro_batches(run: Run, global_batch: GlobalBatch) -> Iterator[Batch]:
    """This rank's micro-batches of a global batch."""
    for micro in run.batches.layout.deal(global_batch, run.world.rank, run.world.size):
        arrays = run.objective.arrays(global_batch.examples, micro)
        yield {name: to_device(array, run.world.device) for name, array in arrays.items()}


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device, copied without a wait where that is possible."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def prefetch(stream: Iterator[Batch | None], ahead: int = 4) -> Iterator[Batch | None]:
    """The same stream, made ahead in a thread; raises what the thread raised."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)

    def work() -> None:
        try:
            for item in stream:
                ready.put(item)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item


class Waited(Generic[T]):
    """An iterator that knows for how many seconds its user has waited."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.seconds = 0.0

    def __iter__(self) -> "Waited[T]":
        return self

    def __next__(self) -> T:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - began


def _stream(run: Run, first: int) -> Iterator[Batch | None]:
    """This rank's micro-batches of all steps after `first`; None ends a step."""
    for k in range(first, run.batches.steps):
        yield from micro_batches(run, run.batches.batch(k))
        yield None
