"""The submission of a job of stages: all of them are checked and frozen, and one request goes to the cluster."""

from pathlib import Path

from clusters.base import Cluster
from orchestrator.backends import make_request
from orchestrator.errors import InputError
from orchestrator.planning.freeze import Sent, frozen_of, git_state
from orchestrator.planning.model import Model
from orchestrator.runs import new_id
from orchestrator.stages.inputs import (
    CheckJob,
    brought_stage,
    check_stage_inputs,
    dated_stage,
    digests_of_stage,
    marked_of_stage,
)
from orchestrator.stages.spec import base_of_stage
from runfolder.digests import Digests
from runfolder.files import Record
from runfolder.staged_job import StagedJob


def check_stages(
    staged: StagedJob,
    is_here: bool,
    check: CheckJob,
) -> tuple[dict[str, Model], tuple[str, ...]]:
    """The base of each stage, and warnings; raises InputError with one line for each problem.

    What a stage takes of another one is checked when it begins, as far as it is not the base's shape. `is_here`: the
    cluster's files are this machine's. `check` is that of a job that trains.
    """
    models = {}
    problems = []
    warnings = []
    for stage, job in staged.stages.items():
        base = base_of_stage(staged, stage)
        seen = job.model_copy(update={"base": base})
        try:
            models[stage], of_stage = check_stage_inputs(seen, is_here, check)
        except InputError as error:
            problems += marked_of_stage(stage, str(error).splitlines())
            continue
        warnings += marked_of_stage(stage, of_stage)
    if problems:
        raise InputError("\n".join(problems))
    return models, tuple(warnings)


def frozen_stages(
    staged: StagedJob,
    models: dict[str, Model],
    folder: Path,
    cluster: str,
    backend: Cluster,
    sent: Sent,
) -> tuple[StagedJob, Record]:
    """The job with its files where it runs, and what RUN_DIR/job.yaml says beside the run id."""
    make_request(backend, staged, new_id(staged.name))  # what is refused is so before files are sent
    stages = {}
    digests: Digests = {}
    before = {}
    is_dated = False
    for stage, job in staged.stages.items():
        model = models[stage]
        dated = dated_stage(job, model)
        is_dated |= dated != job
        there, places = brought_stage(dated, model, backend.site, sent)
        stages[stage] = there
        prefix = f"stages.{stage}."
        own_digests = digests_of_stage(dated, model, backend.site)
        for field, digest in own_digests.items():
            digests[prefix + field] = digest
        for field, place in places.items():
            before[prefix + field] = place
    frozen_job = staged.model_copy(update={"stages": stages})
    record = frozen_of(frozen_job, cluster, digests, git_state(folder))
    return frozen_job, record | {"dated": is_dated, "sent": before}
