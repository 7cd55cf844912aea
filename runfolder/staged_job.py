"""A job of several stages: each is a job, whose inputs may be what earlier ones have left.

In a stage `base: stage:sft` is the model that the stage `sft` has left, and `data: stage:answers/rows.jsonl` a file
of the output of the stage `answers`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from runfolder.generation_job import ROWS_FILE, GenerationJob, is_generation
from runfolder.job import Job, Tracking
from runfolder.resources import Resources, Section
from runfolder.sources import StageOutput, parse_source
from runfolder.variables import Variables

STAGE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,18}[a-z0-9])?")


def _kind_of_stage(stage: Any) -> str:
    """Whether a stage writes or trains."""
    writes = isinstance(stage, GenerationJob)
    if isinstance(stage, dict):
        writes = is_generation(stage)
    return "generate" if writes else "train"


AnyStage = Job | GenerationJob
_ReadStage = Annotated[
    Annotated[Job, Tag("train")] | Annotated[GenerationJob, Tag("generate")],
    Discriminator(_kind_of_stage),
]


class StagedJob(Section):
    """Stages in the order in which they are done, and what all of them share: the place where they are done."""

    name: str = Field("job", description="what run ids begin with, as a job's name")
    stages: dict[str, _ReadStage] = Field(min_length=1, description="the jobs, by the names of their stages")
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    env: Variables = Field({}, description="variables for controller and workers; secret ones are kept apart")

    @model_validator(mode="after")
    def _refers_to_earlier_stages(self) -> "StagedJob":
        earlier: list[str] = []
        for stage, job in self.stages.items():
            for field, reference in references(job).items():
                flaw = self._flaw_of(field, reference, earlier)
                if flaw:
                    raise ValueError(f"stages.{stage}.{field}: found stage:{reference.stage}{flaw}")
            earlier.append(stage)
        return self

    def _flaw_of(self, field: str, reference: StageOutput, earlier: list[str]) -> str:
        """Why a field cannot take what it names of another stage, and what is allowed; empty where it can."""
        if reference.stage not in earlier:
            allowed = ", ".join(earlier) or "none, as it is the first one"
            return f"; allowed: an earlier stage ({allowed})"
        named = self.stages[reference.stage]
        if field == "base.model":
            if isinstance(named, Job):
                return ""
            return ", which writes rows; allowed: a stage that trains"
        if reference.file is None:
            return f"; allowed: a file of its output, like stage:{reference.stage}/{ROWS_FILE}"
        if isinstance(named, GenerationJob) and reference.file != ROWS_FILE:
            return f"/{reference.file}; allowed: stage:{reference.stage}/{ROWS_FILE}"
        return ""

    @property
    def sources(self) -> dict[str, str]:
        """What its stages read that no stage has made, base folders too, by field."""
        by_field = {}
        for stage, job in self.stages.items():
            inputs = {**job.sources, "base": job.base.model}
            for field, source in inputs.items():
                if not isinstance(parse_source(source), StageOutput):
                    by_field[f"stages.{stage}.{field}"] = source
        return by_field

    def dump(self) -> dict[str, Any]:
        """The job as plain data that `StagedJob.model_validate` reads back."""
        return self.model_dump(mode="json")


def is_staged(plain: Mapping[str, Any]) -> bool:
    """Whether the job in plain data has stages."""
    return "stages" in plain


def inputs_of(job: AnyStage) -> dict[str, str]:
    """What a job reads that may be of another stage, by the field that names it."""
    inputs = {"base.model": job.base.model, **job.sources}
    inputs.pop("objective.reward", None)
    return inputs


def references(job: AnyStage) -> dict[str, StageOutput]:
    """What a job takes of other stages, by the field that names it."""
    found = {}
    for field, text in inputs_of(job).items():
        source = parse_source(text)
        if isinstance(source, StageOutput):
            found[field] = source
    return found


def with_inputs(job: AnyStage, texts: Mapping[str, str]) -> AnyStage:
    """The job with other texts in those fields that `inputs_of` gives."""
    sections: dict[str, Any] = {}
    of_base = _within("base", texts)
    sections["base"] = job.base.model_copy(update=of_base)
    if isinstance(job, Job):
        of_data = _within("data", texts)
        sections["data"] = job.data.model_copy(update=of_data)
    else:
        of_generate = _within("generate", texts)
        sections["generate"] = job.generate.model_copy(update=of_generate)
    return job.model_copy(update=sections)


def model_folder(job: AnyStage, run_dir: Path) -> Path:
    """Where the run of a job leaves the model that later stages begin with."""
    output = run_dir / "output"
    if isinstance(job, Job) and job.output.merge:
        return output / "merged"
    return output


def _within(section: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Those of some texts that are of one section, by the field there."""
    found = {}
    for field, text in texts.items():
        before, _, name = field.partition(".")
        if before == section:
            found[name] = text
    return found
