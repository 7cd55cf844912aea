"""Whether a worker fits on its device, by how much, and which changes of the job would make it fit.

A forecast counts what tensors take. A device holds more: CUDA's own context, buffers of NCCL where there are several
workers, and memory that the allocator has but cannot use. What is said to fit is the sum, with a margin.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from methods.options.lora_family import LowRankOptions
from methods.options.low_rank import Lora, QLora
from runfolder.job import Job
from trainer.dry_run.process import BytesByPart, DryRunFailed

CUDA_BYTES = 600 * 2**20  # bytes that CUDA takes for itself, as far as is known
COMMUNICATION = 2**30  # bytes of NCCL's buffers
DRY_RUN_MARGIN = 0.05  # of what is allocated: how far a dry run has been off, and fragments
LINE_MARGIN = 0.2
DRY_RUN = "dry run"
FITTED_LINE = "fitted line"

_NODE_SIZES = (2, 4, 8)  # GPUs that nodes have
_LESS_ACTIVATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"train.micro_batch": 1},
    {"train.micro_batch": 1, "train.gradient_checkpointing": True},
)
_COST_NO_TIME = ("train.kernels", "train.micro_batch")  # or hardly any

Find = Callable[[Job], "Forecast"]  # the forecast of a job; raises DryRunFailed


@dataclass(frozen=True)
class Forecast:
    """Bytes that a worker has allocated in its worst moment, by what they are for, and how that is known."""

    parts: BytesByPart
    source: str  # DRY_RUN or FITTED_LINE
    margin: float
    factor: float = 1.0  # of what was measured to what was foretold,
    runs: int = 0  # in so many earlier runs

    @property
    def allocated(self) -> int:
        """The bytes of all parts together, as measurements correct them."""
        together = sum(self.parts.values())
        return int(self.factor * together)

    def needed(self, workers: int) -> int:
        """The bytes that a device should have."""
        beside = CUDA_BYTES
        if workers > 1:
            beside += COMMUNICATION
        return int(self.allocated * (1 + self.margin)) + beside


@dataclass(frozen=True)
class Change:
    """Settings of a job that were changed, one upon the other, and what a device should have then."""

    settings: dict[str, Any]
    needed: int
    fits: bool

    @property
    def text(self) -> str:
        """The settings in words."""
        settings = []
        for key, value in self.settings.items():
            settings.append(f"{key}={_as_in_job(value)}")
        return " and ".join(settings)


def changes_that_fit(job: Job, find: Find, device: int, now: Forecast) -> list[Change]:
    """Changes that were planned, up to those with which a worker fits on a device, which come last.

    Each is tried with all before it; of those that fit together, what costs time and is not needed is left out again.
    `now` is the forecast of the job as it is. A change is put off for as long as what it leaves as it is takes more
    than the device has.
    """
    tried = list(_changes_upon_each_other(job, find, device, now))
    if tried and tried[-1].fits:
        tried += _with_fewer_settings(job, tried, find, device)
    return tried


def _changes_upon_each_other(job: Job, find: Find, device: int, now: Forecast) -> Iterator[Change]:
    """Changes of a job, each with all before it, up to the first with which a worker fits."""
    settings: dict[str, Any] = {}
    forecast = now
    waiting = list(_candidates(job))
    while True:
        worth_trying = [change for change in waiting if not _is_in_vain(*change, job, forecast, device)]
        if not worth_trying:
            return
        key, value = worth_trying[0]
        waiting.remove((key, value))
        try:
            changed = with_setting(job, key, value)
            forecast = find(changed)
        except (DryRunFailed, ValueError):
            continue
        job = changed
        settings = {**settings, key: value}
        needed = forecast.needed(job.resources.world_size)
        fits = needed <= device
        yield Change(settings, needed, fits)
        if fits:
            return


def _with_fewer_settings(job: Job, tried: list[Change], find: Find, device: int) -> Iterator[Change]:
    """The changes that fit with less than the last one changes, of what costs time."""
    settings = tried[-1].settings
    known = [change.settings for change in tried]
    for left_out in reversed(settings):
        fewer = {key: value for key, value in settings.items() if key != left_out}
        if left_out in _COST_NO_TIME or not fewer or fewer in known:
            continue
        try:
            changed = changed_job(job, fewer)
            needed = find(changed).needed(changed.resources.world_size)
        except (DryRunFailed, ValueError):
            continue
        if needed <= device:
            settings = fewer
            yield Change(settings, needed, True)


def with_more_gpus(job: Job, find: Find, device: int) -> Change | None:
    """The fewest GPUs of one node on which a job fits that shares its weights among them; None where none do.

    Where that alone does not do, with rows one at a time, and with gradient checkpointing.
    """
    resources = job.resources
    if resources.workers_per_node or resources.fewest_nodes > 1:
        return None
    for beside in _LESS_ACTIVATIONS:
        for gpus in _NODE_SIZES:
            if gpus <= resources.workers_on_node:
                continue
            settings = {"resources.gpus_per_node": gpus, "sharding.zero": 3, **beside}
            try:
                changed = changed_job(job, settings)
                needed = find(changed).needed(changed.resources.world_size)
            except (DryRunFailed, ValueError):
                continue
            if needed <= device:
                return Change(settings, needed, True)
    return None


def changed_job(job: Job, settings: Mapping[str, Any]) -> Job:
    """The job with other values of some dotted keys; raises ValueError where the job then makes no sense."""
    for key, value in settings.items():
        job = with_setting(job, key, value)
    return job


def with_setting(job: Job, key: str, value: Any) -> Job:
    """The job with another value of a dotted key; raises ValueError where the job then makes no sense."""
    dumped = job.dump()
    section = dumped
    *path, last = key.split(".")
    for name in path:
        section = section[name]
    section[last] = value
    return Job.model_validate(dumped)


def _as_in_job(value: Any) -> str:
    """A value as job.yaml has it, on one line."""
    if not isinstance(value, dict):
        return str(value).lower()
    pairs = []
    for key, of_key in value.items():
        pairs.append(f"{key}: {_as_in_job(of_key)}")
    inner = ", ".join(pairs)
    return f"{{{inner}}}"


def _is_in_vain(key: str, value: Any, job: Job, now: Forecast, device: int) -> bool:
    """Whether a change of a job surely leaves it too large for a device, or undoes an earlier one."""
    if key == "sharding.zero" and value < job.sharding.zero:
        return True
    rows = job.train.micro_batch
    if key == "train.micro_batch" and value >= rows:
        return True
    parts = {}
    for part, size in now.parts.items():
        if part in _left_alone(key, value):
            parts[part] = size
        elif key == "train.micro_batch":
            parts[part] = size * value // rows
    left = replace(now, parts=parts)
    return left.needed(job.resources.world_size) > device


def _left_alone(key: str, value: Any) -> tuple[str, ...]:
    """The parts of a worker's memory that a change leaves as they are."""
    if key == "method":
        return ()
    if key == "sharding.zero":
        shared = {1: ("weights", "gradients"), 2: ("weights",), 3: ()}
        return shared[value]
    if key == "sharding.offload":
        return "weights", "gradients"
    return "weights", "gradients", "optimizer"


def _candidates(job: Job) -> Iterator[tuple[str, Any]]:
    """What may be changed, from what costs least on; the results of training stay the same but for methods."""
    if job.train.kernels == "plain":
        yield "train.kernels", "fast"
    rows = job.train.micro_batch
    while rows > 1:
        rows //= 2
        yield "train.micro_batch", rows
    if not job.train.gradient_checkpointing:
        yield "train.gradient_checkpointing", True
    if job.resources.world_size > 1:
        for stage in range(job.sharding.zero + 1, 4):
            yield "sharding.zero", stage
    if job.sharding.sequence == 1 and job.resources.workers_on_node % 2 == 0:
        yield "sharding.sequence", 2
    method = job.method
    if method.makes_model and not job.sharding.offloads:  # of an adapter, moments are little
        yield "sharding.offload", "optimizer"
    if method.makes_model:
        method = Lora()
        yield "method", {"kind": method.kind}
    if isinstance(method, LowRankOptions) and not method.quantises:
        yield "method", {"kind": QLora().kind, "rank": method.rank}
