"""How long a job trains: its arithmetic over what its devices do of it, with an interval that holds in 9 of 10 runs.

The share of a device's arithmetic that is used differs between runs by a factor, so its logarithm is averaged. The
interval is that of a prediction: where few runs like the job have been, what spread they are expected to have counts
as much as a few runs more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import fmean, stdev

from orchestrator.planning.earlier import alike
from orchestrator.planning.model import Model
from orchestrator.planning.sizes import Sizes
from runfolder.costs import Costs
from runfolder.job import Job
from runfolder.quantiles import NORMAL, t_quantile
from trainer.devices import peak_of_name

# Shares that an H200 has used with a base of 1B (benchmarks/results, train-step and methods), by kernels and method:
# fast on full rows, plain on padded ones. That of "longlora" on the fast path is a guess.
STATED: Mapping[str, Mapping[str, float]] = {
    "fast": {
        "lora": 0.43,
        "rslora": 0.43,
        "dora": 0.37,
        "qlora": 0.43,
        "adalora": 0.41,
        "longlora": 0.4,
        "relora": 0.41,
        "ia3": 0.47,
        "vera": 0.39,
        "fourierft": 0.34,
        "bottleneck": 0.48,
        "galore": 0.43,
        "prefix": 0.37,
        "prompt": 0.49,
        "ptuning": 0.49,
        "full": 0.45,
    },
    "plain": {
        "lora": 0.15,
        "rslora": 0.15,
        "dora": 0.1,
        "qlora": 0.14,
        "adalora": 0.13,
        "longlora": 0.25,
        "relora": 0.13,
        "ia3": 0.19,
        "vera": 0.13,
        "fourierft": 0.1,
        "bottleneck": 0.19,
        "galore": 0.24,
        "prefix": 0.2,
        "prompt": 0.23,
        "ptuning": 0.22,
        "full": 0.25,
    },
}
CHECKPOINTED = 0.75  # times the share without, as layers run forward once more
SHARED_FROZEN = 0.9  # times the share, where the frozen weights of an adapter's base are gathered at ZeRO 3
SHARED_TRAINED = 0.4  # the same, where trained weights are gathered
STATED_SPREAD = 0.55  # standard deviation of the logarithm: a factor of 2.5 in 9 of 10 runs
UNLIKE_SPREAD = 0.4  # of runs that do the same on another base or device
LIKE_SPREAD = 0.15
EXPECTED = 4  # runs that the expected spread counts as much as
NEAR = 2.0  # times the arithmetic of a token, up to which bases are alike
SECONDS_OF_HOUR = 3600
_BUS = 1e11  # bytes a second of moments to the device and back, by runs of full on an H200
_TRIPS = 2  # of each moment in a step


@dataclass(frozen=True)
class HoursForecast:
    """Hours from the first step to the last, with evaluations and saves: in 9 of 10 runs from `low` to `high`.

    `runs` is how many earlier runs say so; by none of them it is by stated rates.
    """

    low: float
    likely: float
    high: float
    runs: int

    def plus(self, hours: float) -> "HoursForecast":
        """The hours with more that are sure."""
        low = self.low + hours
        likely = self.likely + hours
        high = self.high + hours
        return HoursForecast(low, likely, high, self.runs)

    def times(self, factor: float) -> "HoursForecast":
        """The hours of so many times the work."""
        low = self.low * factor
        likely = self.likely * factor
        high = self.high * factor
        return HoursForecast(low, likely, high, self.runs)


def hours(
    job: Job, model: Model, sizes: Sizes, steps: int, kernels: str, earlier: Sequence[Costs], gpu: str | None
) -> HoursForecast | None:
    """The hours of so many steps of a job, on GPUs of a name; None where nobody knows what these can do."""
    peak = _peak(earlier, gpu)
    if peak is None:
        return None
    per_token = planned_flops(job, model, sizes)
    tokens = steps * job.train.batch_tokens
    flops = per_token * tokens
    per_second = peak * job.resources.world_size
    per_hour = per_second * SECONDS_OF_HOUR
    at_peak = flops / per_hour
    runs_alike = alike(job, kernels, earlier)
    shares, spread = _shares(runs_alike, per_token, peak)
    if shares:
        low, likely, high = prediction(shares, spread)
    else:
        likely = stated_share(job, kernels)
        reach = exp(NORMAL * STATED_SPREAD)
        low = likely / reach
        high = likely * reach
    found = HoursForecast(at_peak / high, at_peak / likely, at_peak / low, len(shares))
    if shares or not sizes.memory.on_host:
        return found
    return found.plus(steps * _TRIPS * sizes.memory.on_host / _BUS / SECONDS_OF_HOUR)


def prediction(shares: Sequence[float], spread: float) -> tuple[float, float, float]:
    """Where the share of the next run lies in 9 of 10 cases, and its middle, by those of others.

    `spread` is the standard deviation that their logarithms are expected to have.
    """
    logarithms = list(map(log, shares))
    middle = fmean(logarithms)
    count = len(shares)
    squares = EXPECTED * spread**2
    for logarithm in logarithms:
        distance = logarithm - middle
        squares += distance**2
    freedom = EXPECTED + count - 1
    variance = squares / freedom
    reach = t_quantile(freedom) * sqrt(variance)
    if count > EXPECTED + 1:  # which say for themselves how much they differ
        alone = t_quantile(count - 1) * stdev(logarithms)
        reach = max(reach, alone)
    reach *= sqrt(1 + 1 / count)
    return exp(middle - reach), exp(middle), exp(middle + reach)


def planned_flops(job: Job, model: Model, sizes: Sizes) -> float:
    """The arithmetic of a token, as the trainer counts it (trainer/speed.py)."""
    lookup = 0
    is_tied = model.config.get("tie_word_embeddings", False)
    if not is_tied and model.embeddings and model.hidden_size:
        lookup = model.embeddings * model.hidden_size
    trained = sizes.trained
    if job.method.makes_model:
        trained = max(0, trained - lookup)
    return 4.0 * (sizes.parameters - lookup) + 2.0 * trained


def _peak(earlier: Sequence[Costs], gpu: str | None) -> float | None:
    """The FLOP/s of a device: by its name, else as the newest run there had it."""
    if gpu is not None:
        named = peak_of_name(gpu)
        if named is not None:
            return named
    for costs in reversed(earlier):
        if costs.work["device"] != "cpu":
            peak: float = costs.work["peak"]
            return peak
    return None


def _shares(like: Sequence[Costs], per_token: float, peak: float) -> tuple[list[float], float]:
    """The shares that runs which did the same have used, on like bases if there are, and their spread."""
    near = []
    far = []
    for costs in like:
        if not costs.utilisation:
            continue
        far.append(costs.utilisation)
        ratio = costs.work["flops_per_token"] / per_token
        if 1 / NEAR < ratio < NEAR and costs.work["peak"] == peak:
            near.append(costs.utilisation)
    if near:
        return near, LIKE_SPREAD
    return far, UNLIKE_SPREAD


def stated_share(job: Job, kernels: str) -> float:
    """The share that a run is taken to use where no earlier one says so."""
    by_method = STATED[kernels]
    share = by_method.get(job.method.kind, by_method["lora"])
    if job.train.gradient_checkpointing:
        share *= CHECKPOINTED
    if job.sharding.zero == 3:
        share *= SHARED_TRAINED if job.method.makes_model else SHARED_FROZEN
    return share
