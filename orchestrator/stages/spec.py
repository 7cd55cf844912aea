"""From a job.yaml with stages to a `StagedJob`: what is said of all stages goes into the job of each.

A stage's `base`, `method` and `objective` stand in place of those of all stages, whole. Of other sections its keys
do, one by one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import InputError
from orchestrator.planning.freeze import JobSource
from orchestrator.planning.spec import PlainJob, load_yaml, overridden, spelled_out, validate, validated
from orchestrator.stages.inputs import absolute_stage
from runfolder.generation_job import GenerationJob, is_generation
from runfolder.job import Base, Job
from runfolder.sources import StageOutput, parse_source
from runfolder.staged_job import STAGE_NAME, AnyStage, StagedJob, is_staged

OF_ALL_STAGES = ("resources", "tracking", "env")  # said once, above the stages
_REPLACED = ("base", "method", "objective")


def read_staged(source: JobSource, overrides: Iterable[str] = ()) -> tuple[StagedJob, Path] | None:
    """A job of stages with absolute paths, and the folder that it was written in; None for another job.

    Raises InputError with one line per error.
    """
    folder = Path.cwd()
    name = "job"
    if isinstance(source, Job):
        return None
    if isinstance(source, Mapping):
        plain = dict(source)
    else:
        name = str(source)
        folder = Path(source).absolute().parent
        plain = load_yaml(Path(source))
    if not is_staged(plain):
        return None
    staged = staged_of(overridden(plain, overrides), name)
    stages = {}
    for stage, job in staged.stages.items():
        stages[stage] = absolute_stage(job, folder)
    return staged.model_copy(update={"stages": stages}), folder


def staged_of(plain: PlainJob, source: str) -> StagedJob:
    """The job of stages in plain data; raises InputError with one line per error."""
    common = dict(plain)
    stages = common.pop("stages")
    if not isinstance(stages, dict) or not stages:
        raise InputError(f"{source}: stages: found {stages!r}; allowed: a mapping of names to jobs")
    jobs = {}
    problems = []
    for stage, written in stages.items():
        try:
            jobs[stage] = _stage_job(common, str(stage), written, source)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    _leave_models(jobs)
    shared: PlainJob = {"stages": jobs}
    for key in ("name", *OF_ALL_STAGES):
        if key in common:
            shared[key] = common[key]
    try:
        return StagedJob.model_validate(shared)
    except ValidationError as error:
        lines = []
        for flaw in error.errors(include_url=False):
            message = flaw["msg"].removeprefix("Value error, ")
            lines.append(f"{source}: {message}")
        raise InputError("\n".join(lines)) from None


def base_of_stage(staged: StagedJob, stage: str) -> Base:
    """The base that the model of a stage goes back to, through the stages that have made it."""
    base = staged.stages[stage].base
    source = parse_source(base.model)
    if isinstance(source, StageOutput):
        return base_of_stage(staged, source.stage)
    return base


def _stage_job(common: PlainJob, stage: str, written: Any, source: str) -> AnyStage:
    """The job of a stage; raises InputError with one line per error."""
    where = f"{source}: stages.{stage}"
    if not STAGE_NAME.fullmatch(stage):
        raise InputError(
            f"{source}: stages: found {stage!r}; allowed: at most 20 of a-z, 0-9 and -, from a letter on"
        )
    if not isinstance(written, dict):
        raise InputError(f"{where}: found {written!r}; allowed: a mapping of keys like data and train")
    for key in ("name", "stages", *OF_ALL_STAGES):
        if key in written:
            raise InputError(f"{where}.{key}: it is said once for all stages; allowed: {key} above stages")
    of_all = spelled_out(common)
    own = spelled_out(written)
    plain = merged_sections(of_all, own)
    name = common.get("name", "job")
    plain["name"] = f"{name}-{stage}"
    if not is_generation(written):
        return validate(plain, (), where)
    for key, value in plain.items():
        if key in GenerationJob.model_fields:
            own[key] = value
    resources = plain.get("resources")
    own["resources"] = _one_worker(resources)
    return validated(GenerationJob, own, (), where)


def _one_worker(resources: Any) -> Any:
    """What a stage that writes needs of what all stages have: one worker, of the same kind."""
    if not isinstance(resources, dict):
        return {}
    one = {}
    for key in ("walltime", "grace"):
        if key in resources:
            one[key] = resources[key]
    if resources.get("gpus_per_node"):
        one["gpus_per_node"] = 1
    return one


def merged_sections(common: PlainJob, own: PlainJob) -> PlainJob:
    """What is said of all stages, with what one says of itself."""
    merged = dict(common)
    for key, value in own.items():
        before = merged.get(key)
        if key not in _REPLACED and isinstance(before, dict) and isinstance(value, dict):
            merged[key] = {**before, **value}
        else:
            merged[key] = value
    return merged


def _leave_models(jobs: dict[str, AnyStage]) -> None:
    """Have those stages leave a whole model with which later ones begin; raises InputError where one cannot."""
    for job in list(jobs.values()):
        source = parse_source(job.base.model)
        if not isinstance(source, StageOutput) or source.stage not in jobs:
            continue
        before = jobs[source.stage]
        if isinstance(before, Job) and not before.method.makes_model:
            plain = before.dump()
            plain["output"] = {"merge": True}
            where = f"stages.{source.stage}, with whose model a later stage begins"
            jobs[source.stage] = validate(plain, (), where)
