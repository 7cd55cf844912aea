"""Whether a worker fits on its device, by how much, and which changes of the job would make it fit.

A forecast counts what tensors take. A device holds more: CUDA's own context, buffers of NCCL where there are several
workers, and memory that the allocator has but cannot use. What is said to fit is the sum, with a margin.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from methods.options.lora_family import LowRankOptions
from methods.options.low_rank import Lora, QLora
from runfolder.job import Job
from trainer.dry_run.process import BytesByPart, DryRunFailed

CUDA_BYTES = 600 * 2**20  # bytes that CUDA takes for itself, as far as is known
COMMUNICATION = 2**30  # bytes of NCCL's buffers
DRY_RUN_MARGIN = 0.05  # of what is allocated: how far a dry run has been off, and fragments
LINE_MARGIN = 0.2

Find = Callable[[Job], "Forecast"]  # the forecast of a job; raises DryRunFailed


@dataclass(frozen=True)
class Forecast:
    """Bytes that a worker has allocated in its worst moment, by what they are for, and how that is known."""

    parts: BytesByPart
    source: str  # dry run, or fitted line
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
            settings.append(f"{key}={value}")
        return " and ".join(settings)


def changes_that_fit(job: Job, find: Find, device: int, now: Forecast) -> list[Change]:
    """Changes that were planned, each with all before it, up to the first with which a worker fits on a device.

    `now` is the forecast of the job as it is. Where its weights alone are more than the device has, changes that
    leave those as they are need no forecast.
    """
    tried: list[Change] = []
    settings: dict[str, Any] = {}
    weights = now.parts.get("weights", 0)
    for key, value in _candidates(job):
        try:
            changed = with_setting(job, key, value)
            in_vain = weights > device and _keeps_weights(key, value)
            forecast = now if in_vain else find(changed)
        except (DryRunFailed, ValueError):
            continue
        job = changed
        settings = {**settings, key: value}
        if in_vain:
            continue
        weights = forecast.parts.get("weights", 0)
        needed = forecast.needed(job.resources.world_size)
        fits = needed <= device
        tried.append(Change(settings, needed, fits))
        if fits:
            break
    return tried


def with_setting(job: Job, key: str, value: Any) -> Job:
    """The job with another value of a dotted key; raises ValueError where the job then makes no sense."""
    dumped = job.dump()
    section = dumped
    *path, last = key.split(".")
    for name in path:
        section = section[name]
    section[last] = value
    return Job.model_validate(dumped)


def _keeps_weights(key: str, value: Any) -> bool:
    """Whether a change leaves a worker's weights as they are."""
    if key == "sharding.zero":
        return bool(value < 3)
    return key != "method"


def _candidates(job: Job) -> Iterator[tuple[str, Any]]:
    """What may be changed, from what costs least on; the results of training stay the same but for methods."""
    if job.train.kernels == "plain" and job.sharding.zero != 3:
        yield "train.kernels", "fast"
    if job.train.micro_batch > 1:
        yield "train.micro_batch", 1
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
