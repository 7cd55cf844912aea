"""The plans of the stages of a job, as far as they are known before any of them is done."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.planning.freeze import JobSource
from orchestrator.planning.plan import Plan, planner_of
from orchestrator.planning.preflight import check_job
from orchestrator.planning.survey import SourceProgress
from orchestrator.stages.inputs import check_stage_inputs, marked_of_stage, readable_rows
from orchestrator.stages.spec import base_of_stage, read_staged
from runfolder.generation_job import AnswerColumn, GenerationJob, JudgedColumns
from trainer.dry_run.process import DryRunProcess


@dataclass(frozen=True)
class WritingPlan:
    """What a stage would write: the columns, of so many rows (None: not known yet), and what that takes at most.

    `asked` is how many questions each row is worth, `new_tokens` how many tokens are written for it at most.
    """

    name: str
    base: str
    columns: tuple[str, ...]
    rows: int | None
    asked: int
    new_tokens: int

    def dump(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)


StagePlan = Plan | WritingPlan


def plan_stages(
    source: JobSource,
    overrides: Iterable[str],
    progress: SourceProgress,
    cluster: str | None,
    gpu: str | None,
) -> dict[str, StagePlan] | None:
    """The plan of each stage, by its name; None for a job without stages. Raises InputError.

    Rows that a stage makes are not known, and neither is how many steps an epoch over them has.
    """
    found = read_staged(source, overrides)
    if found is None:
        return None
    staged, _ = found
    is_here = cluster is None or open_cluster(cluster).site.is_here
    plans: dict[str, StagePlan] = {}
    with DryRunProcess() as process:
        for stage, job in staged.stages.items():
            base = base_of_stage(staged, stage)
            seen = job.model_copy(update={"base": base})
            try:
                if isinstance(seen, GenerationJob):
                    check_stage_inputs(seen, is_here, check_job)
                    plan: StagePlan = _writing_plan(seen, is_here)
                else:
                    planner = planner_of(seen, process, progress, cluster, gpu)
                    plan = replace(planner.plan(seen), request=None)  # one request is for all of them
            except InputError as error:
                lines = marked_of_stage(stage, str(error).splitlines())
                raise InputError("\n".join(lines)) from None
            plans[stage] = replace(plan, base=job.base.model)
    return plans


def _writing_plan(job: GenerationJob, is_here: bool) -> WritingPlan:
    """The plan of a stage that writes; raises InputError where its rows cannot be read."""
    rows = readable_rows(job.generate.rows, is_here)
    asked = 0
    new_tokens = 0
    for column in job.generate.columns.values():
        if isinstance(column, AnswerColumn):
            asked += 1
            new_tokens += column.max_new_tokens
        elif isinstance(column, JudgedColumns):
            asked += 2
    columns = tuple(job.generate.columns)
    count = None if rows is None else len(rows)
    return WritingPlan(job.name, job.base.model, columns, count, asked, new_tokens)
