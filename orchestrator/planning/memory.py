"""What a plan says of a worker's memory: the forecast, whether it fits, and what to change where it does not."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from methods.options.base import BaseConfig
from orchestrator.planning.earlier import UNCORRECTED, PastRatios
from orchestrator.planning.fitted_line import fitted
from orchestrator.planning.model import Model
from runfolder.job import Job
from trainer.data.survey import Sample
from trainer.dry_run.fit import DRY_RUN, Change, Find, Forecast, changes_that_fit, with_more_gpus
from trainer.dry_run.process import DryRunFailed, DryRunner, DryRunProcess, can_dry_run

CorrectionOf = Callable[[Job], PastRatios]
Numerics = Callable[[Job], tuple[str, bool]]  # the precision of a job, and whether its kernels are fast


def _dumped(change: Change) -> dict[str, Any]:
    """A change as plain data."""
    settings = change.settings
    needed = change.needed
    fits = change.fits
    return {"settings": settings, "needed": needed, "fits": fits}


@dataclass(frozen=True)
class MemoryFit:
    """The forecast of a worker's memory, with the bytes that its device should have and those that it has.

    `fits` is None where no device is known. `problem` is why there was no dry run, where there was none.
    """

    forecast: Forecast
    needed: int
    device: int | None
    fits: bool | None
    changes: tuple[Change, ...]
    problem: str | None
    more_gpus: Change | None = None  # with its own method, where nothing less does; by the fitted line

    @property
    def advised(self) -> Change | None:
        """The change with which it fits; None where it does as it is, or with none that is known."""
        if self.changes and self.changes[-1].fits:
            return self.changes[-1]
        return None

    @property
    def keeps_method(self) -> bool:
        """Whether it fits, as it is or with a change that leaves the method as it is."""
        if self.advised is None:
            return bool(self.fits)
        return "method" not in self.advised.settings

    @property
    def own_change(self) -> Change | None:
        """The change with which it fits by its own method, if need be on more GPUs; None without one."""
        if self.keeps_method:
            return self.advised
        return self.more_gpus

    def dump(self) -> dict[str, Any]:
        """The fit as plain data, for JSON."""
        forecast = self.forecast
        tried = []
        for change in self.changes:
            tried.append(_dumped(change))
        more_gpus = None if self.more_gpus is None else _dumped(self.more_gpus)
        return {
            "parts": forecast.parts,
            "allocated": forecast.allocated,
            "source": forecast.source,
            "factor": forecast.factor,
            "runs": forecast.runs,
            "margin": forecast.margin,
            "needed": self.needed,
            "device": self.device,
            "fits": self.fits,
            "changes": tried,
            "more_gpus": more_gpus,
            "problem": self.problem,
        }


def fit(
    job: Job,
    model: Model,
    sample: Sample | None,
    kinds: Numerics,
    device: int | None,
    process: DryRunProcess,
    corrected: CorrectionOf = lambda _: UNCORRECTED,
    roughly: bool = False,
) -> MemoryFit:
    """The fit of a job on devices of so many bytes; raises DryRunFailed where nothing can be said.

    `process` makes dry runs. `corrected` says what earlier runs have to say of a job's dry run. `roughly`: without a
    dry run where the fitted line leaves no doubt.
    """

    def on_line(changed: Job) -> Forecast:
        precision, fast = kinds(changed)
        found = fitted(changed, model, sample, precision, fast)
        if found is None:
            raise DryRunFailed("no line was fitted for this method, base and objective")
        return found

    found = _rough_fit(job, on_line, device) if roughly else None
    if found is None:
        runner = DryRunner(process, config_of_base(model), sample)
        found = _sure_fit(job, runner, kinds, device, corrected, on_line)
    if found.device is None or found.keeps_method:
        return found
    return replace(found, more_gpus=with_more_gpus(job, on_line, found.device))


def _rough_fit(job: Job, on_line: Find, device: int | None) -> MemoryFit | None:
    """The fit of a job by the fitted line; None where that leaves a doubt."""
    with suppress(DryRunFailed):
        forecast = on_line(job)
        if _leaves_no_doubt(job, forecast, device):
            return _with_changes(job, forecast, on_line, device, None)
    return None


def _sure_fit(
    job: Job, runner: DryRunner, kinds: Numerics, device: int | None, corrected: CorrectionOf, on_line: Find
) -> MemoryFit:
    """The fit of a job by a dry run, else by the fitted line; raises DryRunFailed where nothing can be said."""
    problem = "torch and what belongs to it are not installed: pip install 'fleetune[train]'"
    if can_dry_run():
        try:
            return _dry_fit(job, runner, kinds, device, corrected)
        except DryRunFailed as error:
            problem = str(error)
    try:
        forecast = on_line(job)
    except DryRunFailed as error:
        raise DryRunFailed(f"{problem}; {error}") from None
    return _with_changes(job, forecast, on_line, device, problem)


def _dry_fit(job: Job, runner: DryRunner, kinds: Numerics, device: int | None, corrected: CorrectionOf) -> MemoryFit:
    """The fit of a job by a dry run; raises DryRunFailed."""

    def tried(changed: Job) -> Forecast:
        precision, fast = kinds(changed)
        parts = runner.parts(changed, precision, fast)
        past = corrected(changed)
        margin = past.margin
        factor = past.factor
        return Forecast(parts, DRY_RUN, margin, factor, past.runs)

    forecast = tried(job)
    return _with_changes(job, forecast, tried, device, None)


def _leaves_no_doubt(job: Job, forecast: Forecast, device: int | None) -> bool:
    """Whether a job surely fits by a forecast with its margin, or surely does not."""
    if device is None:
        return True
    most = forecast.needed(job.resources.world_size)
    least = most * (1 - forecast.margin) / (1 + forecast.margin)
    return most <= device or least > device


def config_of_base(model: Model) -> BaseConfig:
    """The config.json of a base, with as many embeddings as the job has it have; random weights are not in 4 bits."""
    config = dict(model.config)
    if not model.in_4_bits:
        config.pop("quantization_config", None)
    if model.embedding_rows is not None:
        config["vocab_size"] = model.embedding_rows
    return config


def _with_changes(job: Job, forecast: Forecast, find: Find, device: int | None, problem: str | None) -> MemoryFit:
    """The fit of a job by its forecast, and the changes that were tried where it does not fit."""
    needed = forecast.needed(job.resources.world_size)
    if device is None:
        return MemoryFit(forecast, needed, None, None, (), problem)
    fits = needed <= device
    if fits:
        return MemoryFit(forecast, needed, device, True, (), problem)
    tried = tuple(changes_that_fit(job, find, device, forecast))
    return MemoryFit(forecast, needed, device, False, tried, problem)
