"""What a job would run: layout, batches, parameters, and bytes per worker, before anything is started."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from orchestrator.planning.freeze import Source, read
from orchestrator.planning.model import Model, count
from orchestrator.planning.preflight import check, has_gpus
from orchestrator.planning.survey import Progress, Rows
from runfolder.job import Job


@dataclass(frozen=True)
class Memory:
    """Bytes on each worker, without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, with the adapter's, and the bytes of them."""

    parameters: int
    trained: int
    memory: Memory
    held: int  # bytes of weights in 4 bits, which every worker holds at every stage


@dataclass(frozen=True)
class Plan:
    """What would run. Sizes are None for a base whose shapes cannot be known from here."""

    name: str
    base: str
    method: str
    workers: int
    zero: int
    precision: str
    rows: int | None
    eval_rows: int | None
    batch_tokens: int
    micro_batches: int  # forward passes per worker and step, when every batch is full
    steps: int | None
    steps_estimated: bool
    sizes: Sizes | None
    warnings: tuple[str, ...]

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def plan(source: Source, overrides: Iterable[str] = (), progress: Progress = lambda _source, _rows: None) -> Plan:
    """The plan of a job; raises InputError when it could not run.

    `progress` is called with a data source and the number of its rows that are looked at.
    """
    job, _ = read(source, overrides)
    found = check(job, progress)
    per_pass = job.resources.world * job.train.micro_batch * job.data.seq_len
    return Plan(
        name=job.name,
        base=job.base.model,
        method=job.method.kind,
        workers=job.resources.world,
        zero=job.sharding.zero,
        precision=precision(job),
        rows=found.train.count if found.train else None,
        eval_rows=found.eval.count if found.eval else None,
        batch_tokens=job.train.batch_tokens,
        micro_batches=ceil(job.train.batch_tokens / per_pass),
        steps=job.train.steps or _steps(job, found.train),
        steps_estimated=job.train.steps is None,
        sizes=sizes(job, found.model),
        warnings=found.warnings,
    )


def precision(job: Job) -> str:
    """bf16 or fp32, as the job says or as its workers have GPUs."""
    return job.train.precision if job.train.precision != "auto" else "bf16" if has_gpus(job) else "fp32"


def sizes(job: Job, model: Model) -> Sizes | None:
    """Parameters and bytes per worker of a job on a base; None when its shapes are not known."""
    if not model.shapes:
        return None
    method, shapes = job.method, (model.linears, model.others)
    new = 0 if method.makes_model else model.added
    added, trained = method.adds(*shapes) + new, method.trained(*shapes) + new
    # Frozen weights keep the dtype of the forward pass; those of a method that leaves a model are fp32 throughout.
    element = 2 if precision(job) == "bf16" and not method.makes_model else 4
    shared, held = model.frozen_bytes(element) if model.in_4_bits else method.frozen_bytes(*shapes, element)
    state = method.optimizer_bytes(*shapes)
    found = memory(shared, held, trained, state, job.sharding.zero, job.resources.world)
    return Sizes(count(model.shapes) + added, trained, found, held)


def memory(shared: int, held: int, trained: int, state: tuple[int, int], zero: int, world: int) -> Memory:
    """Bytes per worker, from the number of trained parameters and the bytes of frozen weights and optimizer `state`.

    Trained weights and gradients are fp32. ZeRO 1 and 2 keep an fp32 copy of each worker's part; ZeRO 3 shares the
    frozen weights too, but not those `held` by every worker. The second part of `state` is never shared.
    """
    part, whole, own = ceil(trained / world), 4 * trained, ceil(state[0] / world) + state[1]
    match zero:
        case 0:
            return Memory(held + shared + whole, whole, sum(state))
        case 1:
            return Memory(held + shared + whole, whole, 4 * part + own)
        case 2:
            return Memory(held + shared + whole, 4 * part, 4 * part + own)
    return Memory(held + ceil(shared / world) + 4 * part, 4 * part, 4 * part + own)


def _steps(job: Job, train: Rows | None) -> int | None:
    if train is None or job.train.epochs is None:
        return None
    return max(1, ceil(job.train.epochs * train.tokens / job.train.batch_tokens))
