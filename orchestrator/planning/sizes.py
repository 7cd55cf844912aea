"""Numbers of parameters of a job, and the bytes of weights, gradients and optimizer on each worker."""

import os
from dataclasses import dataclass
from math import ceil

from clusters.machine import total_capacity
from orchestrator.planning.model import Model, parameter_count
from orchestrator.planning.preflight import has_gpus
from runfolder.job import Job

OptimizerBytes = tuple[int, int]  # bytes of the optimizer's state: what ZeRO shares, and what it does not


@dataclass(frozen=True)
class Memory:
    """Bytes on each worker's device, without activations, and those of its optimizer that its host has instead."""

    weights: int
    gradients: int
    optimizer: int
    on_host: int = 0

    @property
    def total(self) -> int:
        """The bytes of all of them together."""
        of_training = self.gradients + self.optimizer
        return self.weights + of_training

    def offloaded(self, moments: int) -> "Memory":
        """The same with moments of so many bytes on the host, where no copy of the weights is kept beside them."""
        on_device = (self.weights, self.gradients, 0)
        return Memory(*on_device, moments)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, with the adapter's, and the bytes of them."""

    parameters: int
    trained: int
    memory: Memory
    held: int  # bytes of weights in 4 bits, which every worker holds at every stage


def planned_precision(job: Job, kind: str | None = None) -> str:
    """bf16 or fp32, as the job says or as its workers have GPUs, on a cluster of this kind; None: this machine."""
    if job.train.precision != "auto":
        return job.train.precision
    return "bf16" if has_gpus(job, kind or total_capacity()[0]) else "fp32"


def planned_kernels(job: Job, kind: str | None = None) -> str:
    """Fast or plain, as the job says or as its workers have GPUs and its layout allows."""
    if job.train.kernels != "auto":
        return job.train.kernels
    on_gpus = has_gpus(job, kind or total_capacity()[0])
    return "fast" if on_gpus and job.is_fast_on_gpus else "plain"


def sizes(job: Job, model: Model, kind: str | None = None) -> Sizes | None:
    """Parameters and bytes per worker of a job on a base; None when its shapes are not known."""
    if not model.shapes:
        return None
    method = job.method
    linears = model.linears
    others = model.other_shapes
    new_rows = model.added
    if method.makes_model:  # its weights have them already
        new_rows = 0
    added = method.added_parameters(linears, others) + new_rows
    trained = method.trained_parameters(linears, others) + new_rows
    shared, held = _frozen_bytes(job, model, kind)
    state = method.optimizer_bytes(linears, others)
    zero = job.sharding.zero
    workers = job.resources.world_size
    are_whole = False
    if trained == added and not model.in_4_bits:
        frozen = parameter_count(model.shapes)
        are_whole = job.keeps_trained_whole(trained, frozen)
    of_weight = 4 if job.train.master_weights else 2
    per_worker = memory(shared, held, trained, state, zero, workers, of_weight, are_whole)
    if job.sharding.offloads:
        moments, _ = state
        sharing = workers if zero else 1
        per_worker = per_worker.offloaded(ceil(moments / sharing))
    parameters = parameter_count(model.shapes) + added
    return Sizes(parameters, trained, per_worker, held)


def host_bytes() -> int:
    """The bytes of this machine's memory."""
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _frozen_bytes(job: Job, model: Model, kind: str | None) -> tuple[int, int]:
    """Bytes of the frozen weights: those that ZeRO 3 shares, those that every worker holds."""
    # Frozen weights keep the dtype of the forward pass; those of a method that leaves a model are as trained ones.
    element = 4
    in_fp32 = job.method.makes_model and job.train.master_weights
    if planned_precision(job, kind) == "bf16" and not in_fp32:
        element = 2
    if model.in_4_bits:
        return model.frozen_bytes(element)
    linears = model.linears
    others = model.other_shapes
    return job.method.frozen_bytes(linears, others, element)


def memory(
    shared: int,
    held: int,
    trained: int,
    state: OptimizerBytes,
    zero: int,
    world_size: int,
    of_weight: int = 4,
    are_whole: bool = False,
) -> Memory:
    """Bytes per worker, from the number of trained parameters and the bytes of frozen weights and optimizer `state`.

    Gradients are fp32, and trained weights too, unless `of_weight` says other bytes of one at ZeRO 0. ZeRO 1 and 2
    keep an fp32 copy of each worker's part; ZeRO 3 shares the weights too, but not those `held` by every worker, nor
    trained ones that `are_whole`. The second part of `state` is never shared.
    """
    state_shared, state_held = state
    whole = 4 * trained
    part = 4 * ceil(trained / world_size)
    weights = held + shared + of_weight * trained
    state_part = ceil(state_shared / world_size) + state_held
    optimizer = part + state_part
    match zero:
        case 0:
            return Memory(weights, whole, state_shared + state_held)
        case 1:
            return Memory(weights, whole, optimizer)
        case 2:
            return Memory(weights, part, optimizer)
    shared_part = ceil(shared / world_size)
    of_trained = whole if are_whole else part
    weights = held + shared_part + of_trained
    return Memory(weights, part, optimizer)
