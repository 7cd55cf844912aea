"""What a job would run: layout, batches, parameters, and bytes per worker, before anything is started."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from clusters.machine import total_capacity
from orchestrator.planning.freeze import JobSource, read_job
from orchestrator.planning.model import Model, parameter_count
from orchestrator.planning.preflight import check_job, has_gpus
from orchestrator.planning.survey import SourceProgress, SourceRows
from runfolder.job import Job

OptimizerBytes = tuple[int, int]  # bytes of the optimizer's state: what ZeRO shares, and what it does not


@dataclass(frozen=True)
class Memory:
    """Bytes on each worker, without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The bytes of all of them together."""
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
    objective: str
    needs: str  # what the objective takes beside a forward and a backward pass over its rows
    workers: int
    zero: int
    precision: str
    kernels: str
    lr: float  # at its peak
    lr_source: str  # where it comes from, in words
    rows: int | None
    eval_rows: int | None
    batch_tokens: int
    micro_batches: int  # forward passes per worker and step, when every batch is full
    steps: int | None
    steps_estimated: bool
    sizes: Sizes | None
    warnings: tuple[str, ...]

    def dump(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)


def plan(
    source: JobSource, overrides: Iterable[str] = (), progress: SourceProgress = lambda _source, _rows: None
) -> Plan:
    """The plan of a job; raises InputError when it could not run.

    `progress` is called with a data source and the number of its rows that are looked at.
    """
    job, _ = read_job(source, overrides)
    findings = check_job(job, progress)
    hidden_size = findings.model.hidden_size
    return Plan(
        name=job.name,
        base=job.base.model,
        method=job.method.kind,
        objective=job.objective.kind,
        needs=job.objective.needs,
        workers=job.resources.world_size,
        zero=job.sharding.zero,
        precision=planned_precision(job),
        kernels=planned_kernels(job),
        lr=job.at_width(hidden_size).lr,
        lr_source=_rate_source(job, hidden_size),
        rows=_count(findings.train),
        eval_rows=_count(findings.eval),
        batch_tokens=job.train.batch_tokens,
        micro_batches=_micro_batches(job),
        steps=job.train.steps or _estimated_steps(job, findings.train),
        steps_estimated=job.train.steps is None,
        sizes=sizes(job, findings.model),
        warnings=findings.warnings,
    )


def _rate_source(job: Job, hidden_size: int | None) -> str:
    """Where a job's learning rate comes from."""
    if job.train.lr is not None:
        return "train.lr"
    source = _default_source(job, hidden_size)
    objective = job.objective
    if objective.rate_factor == 1:
        return source
    return f"{objective.rate_factor:g} times the {source}, for {objective.kind}"


def _default_source(job: Job, hidden_size: int | None) -> str:
    """Of which method and width the default learning rate is."""
    method = job.method
    source = f"default of {method.kind}"
    if method.width_exponent == 0:
        return source
    if hidden_size is None:
        return f"{source}, as the base's width is not known"
    return f"{source} at hidden size {hidden_size}"


def _count(rows: SourceRows | None) -> int | None:
    return rows.count if rows else None


def _micro_batches(job: Job) -> int:
    """Forward passes per worker and step, when every batch is full."""
    sequences = job.resources.world_size * job.train.micro_batch
    tokens_per_pass = sequences * job.data.seq_len
    passes = job.train.batch_tokens / tokens_per_pass
    return ceil(passes)


def planned_precision(job: Job) -> str:
    """bf16 or fp32, as the job says or as its workers have GPUs."""
    if job.train.precision != "auto":
        return job.train.precision
    return "bf16" if has_gpus(job, total_capacity()[0]) else "fp32"


def planned_kernels(job: Job) -> str:
    """Fast or plain, as the job says or as its workers have GPUs and its layout allows."""
    if job.train.kernels != "auto":
        return job.train.kernels
    on_gpus = has_gpus(job, total_capacity()[0])
    return "fast" if on_gpus and job.sharding.zero != 3 else "plain"


def sizes(job: Job, model: Model) -> Sizes | None:
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
    shared, held = _frozen_bytes(job, model)
    state = method.optimizer_bytes(linears, others)
    zero = job.sharding.zero
    workers = job.resources.world_size
    per_worker = memory(shared, held, trained, state, zero, workers)
    parameters = parameter_count(model.shapes) + added
    return Sizes(parameters, trained, per_worker, held)


def _frozen_bytes(job: Job, model: Model) -> tuple[int, int]:
    """Bytes of the frozen weights: those that ZeRO 3 shares, those that every worker holds."""
    # Frozen weights keep the dtype of the forward pass; those of a method that leaves a model are fp32 throughout.
    element = 4
    if planned_precision(job) == "bf16" and not job.method.makes_model:
        element = 2
    if model.in_4_bits:
        return model.frozen_bytes(element)
    linears = model.linears
    others = model.other_shapes
    return job.method.frozen_bytes(linears, others, element)


def memory(shared: int, held: int, trained: int, state: OptimizerBytes, zero: int, world_size: int) -> Memory:
    """Bytes per worker, from the number of trained parameters and the bytes of frozen weights and optimizer `state`.

    Trained weights and gradients are fp32. ZeRO 1 and 2 keep an fp32 copy of each worker's part; ZeRO 3 shares the
    frozen weights too, but not those `held` by every worker. The second part of `state` is never shared.
    """
    state_shared, state_held = state
    whole = 4 * trained
    part = 4 * ceil(trained / world_size)
    weights = held + shared + whole
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
    weights = held + shared_part + part
    return Memory(weights, part, optimizer)


def _estimated_steps(job: Job, train: SourceRows | None) -> int | None:
    if train is None or job.train.epochs is None:
        return None
    tokens = job.train.epochs * train.tokens
    steps = ceil(tokens / job.train.batch_tokens)
    return max(1, steps)
