"""What earlier runs of a cluster say of a job: how far forecasts of its memory were off, and which did the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, stdev

from clusters.base import Unreachable
from orchestrator.runs import by_age
from runfolder.costs import Costs
from runfolder.job import Job
from runfolder.site import Site
from trainer.dry_run.fit import DRY_RUN_MARGIN

NEWEST = 15  # runs that are looked at: all of their rows are read
LEAST_MARGIN = 0.03
DEVIATIONS = 3.0  # of the ratios that were seen, which a margin covers
ENOUGH = 3  # ratios, from which their spread says how large a margin has to be
MOST = 2.0  # times the forecast: a ratio beyond it is another matter than what a forecast leaves out


@dataclass(frozen=True)
class PastRatios:
    """How much more than foretold was measured, by so many runs, and the margin that is left to be kept."""

    factor: float = 1.0
    margin: float = DRY_RUN_MARGIN
    runs: int = 0


UNCORRECTED = PastRatios()
USED_BEFORE = {"offload": "none", "master_weights": True}  # of runs that do not say so, as nothing else was there


def earlier_costs(site: Site) -> list[Costs]:
    """The costs of the newest runs of a site, the oldest first; none where it cannot be reached."""
    try:
        newest = by_age(site.ids())[-NEWEST:]
        snapshots = site.snapshots(newest, in_full=True)
    except Unreachable:
        return []
    costs = []
    for run_id in newest:
        run = snapshots.get(run_id)
        if run is not None and run.costs is not None:
            costs.append(run.costs)
    return costs


def correction_of(job: Job, kernels: str, earlier: Iterable[Costs]) -> PastRatios:
    """What runs like a job say of forecasts of its memory."""
    ratios = []
    for costs in alike(job, kernels, earlier):
        if costs.foretold and costs.measured:
            ratio = costs.measured / costs.foretold
            if 1 / MOST < ratio < MOST:
                ratios.append(ratio)
    if not ratios:
        return UNCORRECTED
    margin = DRY_RUN_MARGIN
    if len(ratios) >= ENOUGH:
        margin = max(LEAST_MARGIN, DEVIATIONS * stdev(ratios))
    return PastRatios(median(ratios), margin, len(ratios))


def alike(job: Job, kernels: str, earlier: Iterable[Costs]) -> list[Costs]:
    """Of some costs those of runs that did the same as a job."""
    wanted = {
        "method": job.method.kind,
        "objective": job.objective.kind,
        "zero": job.sharding.zero,
        "offload": job.sharding.offload,
        "kernels": kernels,
        "checkpointing": job.train.gradient_checkpointing,
        "master_weights": job.train.master_weights,
    }
    found = []
    for costs in earlier:
        work = {**USED_BEFORE, **costs.work}
        if wanted.items() <= work.items():
            found.append(costs)
    return found
