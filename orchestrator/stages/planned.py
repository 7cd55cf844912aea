"""The plans of the stages of a job, as far as they are known before any of them is done."""

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.planning.freeze import JobSource
from orchestrator.planning.plan import Plan, planner_of
from orchestrator.planning.survey import SourceProgress
from orchestrator.stages.spec import base_of_stage, read_staged
from runfolder.job import Job


def plan_stages(
    source: JobSource,
    overrides: Iterable[str],
    progress: SourceProgress,
    cluster: str | None,
    gpu_gib: float | None,
) -> dict[str, Plan] | None:
    """The plan of each stage that trains, by its name; None for a job without stages. Raises InputError.

    Rows that a stage makes are not known, and neither is how many steps an epoch over them has.
    """
    found = read_staged(source, overrides)
    if found is None:
        return None
    staged, _ = found
    plans = {}
    for stage, job in staged.stages.items():
        if not isinstance(job, Job):
            continue
        base = base_of_stage(staged, stage)
        seen = job.model_copy(update={"base": base})
        planner = planner_of(seen, progress, cluster, gpu_gib)
        plan = planner.plan(seen)
        plans[stage] = replace(plan, base=job.base.model, request=None)  # one request is for all of them
    return plans
