"""A job of several stages: each is a job, whose inputs may be what earlier ones have left.

In a stage `base: stage:sft` is the model that the stage `sft` has left, and `data: stage:answers/rows.jsonl` a file
of the output of the stage `answers`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from runfolder.job import JOB_NAME, Job, Tracking
from runfolder.resources import Resources, Section
from runfolder.sources import StageOutput, parse_source
from runfolder.variables import Variables

STAGE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,18}[a-z0-9])?")


class StagedJob(Section):
    """Stages in the order in which they are done, and what all of them share: the place where they are done."""

    name: str = Field("job", description="what run ids begin with, as a job's name")
    stages: dict[str, Job] = Field(min_length=1, description="the jobs, by the names of their stages")
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    env: Variables = Field({}, description="variables for controller and workers; secret ones are kept apart")

    @field_validator("stages")
    @classmethod
    def _has_names(cls, stages: dict[str, Job]) -> dict[str, Job]:
        for stage, job in stages.items():
            if not STAGE_NAME.fullmatch(stage):
                raise ValueError(f"found {stage!r}; allowed: at most 20 of a-z, 0-9 and -, from a letter on")
            if not JOB_NAME.fullmatch(job.name):
                raise ValueError(f"{stage}: name and stage together, {job.name!r}, have more than 32 characters")
        return stages

    @model_validator(mode="after")
    def _refers_to_earlier_stages(self) -> "StagedJob":
        earlier: list[str] = []
        for stage, job in self.stages.items():
            for field, reference in references(job).items():
                if reference.stage not in earlier:
                    allowed = ", ".join(earlier) or "none, as it is the first one"
                    found = f"found stage:{reference.stage}; allowed: an earlier stage ({allowed})"
                    raise ValueError(f"stages.{stage}.{field}: {found}")
            earlier.append(stage)
        return self

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


def references(job: Job) -> dict[str, StageOutput]:
    """What a job takes of other stages, by the field that names it."""
    found = {}
    inputs = {"base.model": job.base.model, "data.train": job.data.train, "data.eval": job.data.eval or ""}
    for field, text in inputs.items():
        source = parse_source(text)
        if isinstance(source, StageOutput):
            found[field] = source
    return found


def with_inputs(job: Job, texts: Mapping[str, str]) -> Job:
    """The job with other texts in its fields `base.model`, `data.train` and `data.eval`."""
    base = job.base.model_copy(update=_within("base", texts))
    data = job.data.model_copy(update=_within("data", texts))
    return job.model_copy(update={"base": base, "data": data})


def model_folder(job: Job, run_dir: Path) -> Path:
    """Where the run of a job leaves the model that later stages begin with."""
    output = run_dir / "output"
    return output / "merged" if job.output.merge else output


def _within(section: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Those of some texts that are of one section, by the field there."""
    found = {}
    for field, text in texts.items():
        before, _, name = field.partition(".")
        if before == section:
            found[name] = text
    return found
