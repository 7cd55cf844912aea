"""The submission of a job of stages: all of them are checked and frozen, and one request goes to the cluster."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from clusters.base import Cluster
from orchestrator.backends import make_request
from orchestrator.errors import InputError
from orchestrator.planning.freeze import Sent, brought, frozen_of, git_state, input_digests, places_before
from orchestrator.planning.preflight import Findings
from orchestrator.planning.survey import with_date, writes_date
from orchestrator.runs import new_id
from orchestrator.stages.spec import base_of_stage
from runfolder.digests import Digests
from runfolder.files import Record
from runfolder.job import Job
from runfolder.staged_job import StagedJob, references

CheckStage = Callable[[Job], Findings]


def check_stages(staged: StagedJob, check: CheckStage) -> tuple[dict[str, Findings], tuple[str, ...]]:
    """What the checks of each stage found, and their warnings; raises InputError with one line for each problem.

    What a stage takes of another one is checked when it begins, as far as it is not the base's shape.
    """
    findings = {}
    problems = []
    warnings = []
    for stage, job in staged.stages.items():
        seen = job.model_copy(update={"base": base_of_stage(staged, stage)})
        try:
            findings[stage] = check(seen)
        except InputError as error:
            problems += [f"stages.{stage}: {line}" for line in str(error).splitlines()]
            continue
        warnings += [f"stages.{stage}: {warning}" for warning in findings[stage].warnings]
    if problems:
        raise InputError("\n".join(problems))
    return findings, tuple(warnings)


def frozen_stages(
    staged: StagedJob, findings: dict[str, Findings], folder: Path, cluster: str, backend: Cluster, sent: Sent
) -> tuple[StagedJob, Record]:
    """The job with its files where it runs, and what RUN_DIR/job.yaml says beside the run id."""
    make_request(backend, staged, new_id(staged.name))  # what is refused is so before files are sent
    stages = {}
    digests: Digests = {}
    before = {}
    is_dated = False
    for stage, job in staged.stages.items():
        model = findings[stage].model
        if job.data.date is None and writes_date(model):
            job = with_date(job)
            is_dated = True
        if "base.model" in references(job):
            own = partial(input_digests, job, None, backend.site)
        else:
            own = partial(input_digests, job, model.folder, backend.site)
        there = brought(job, model, backend.site, sent)
        prefix = f"stages.{stage}."
        for field, digest in own().items():
            digests[prefix + field] = digest
        for field, place in places_before(job, there).items():
            before[prefix + field] = place
        stages[stage] = there.at_width(model.hidden_size)
    frozen_job = staged.model_copy(update={"stages": stages})
    record = frozen_of(frozen_job, cluster, digests, git_state(folder))
    return frozen_job, record | {"dated": is_dated, "sent": before}
