"""A job that evaluates: adapters and their base answer questions on a cluster, as another one trains there.

It has what a cluster needs of any job: a name, what the workers need, and variables.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from runfolder.generation_job import GenerationJob, is_generation
from runfolder.job import JOB_NAME, Base, Job
from runfolder.resources import Resources, Section, as_mapping
from runfolder.service import ServiceSpec, is_service
from runfolder.staged_job import StagedJob, is_staged
from runfolder.variables import Variables

EVALUATION_NAME = "evaluate"


class EvaluationJob(Section):
    """One evaluation of adapters on one base. Paths are those of the cluster."""

    name: str = Field(EVALUATION_NAME, pattern=f"^({JOB_NAME.pattern})$", description="what run ids begin with")
    base: Annotated[Base, as_mapping("model")]
    adapters: dict[str, str] = Field(description="the folder of each adapter, by what it is called in the results")
    questions: str = Field(min_length=1, description="the file of what is asked: {base_digest, tasks}")
    resources: Resources = Resources()
    env: Variables = Field({}, description="variables for controller and worker; secret ones are kept apart")

    @field_validator("resources")
    @classmethod
    def _has_one_worker(cls, resources: Resources) -> Resources:
        if resources.is_elastic or resources.world_size != 1:
            raise ValueError("an evaluation has one worker; allowed: nodes 1 and gpus_per_node or workers_per_node 1")
        return resources

    @property
    def sources(self) -> dict[str, str]:
        """What it reads beside the base, by field."""
        by_field = {"questions": self.questions}
        for label, folder in self.adapters.items():
            by_field[f"adapters.{label}"] = folder
        return by_field

    def dump(self) -> dict[str, Any]:
        """The job as plain data that `EvaluationJob.model_validate` reads back."""
        return self.model_dump(mode="json")


AnyJob = Job | EvaluationJob | ServiceSpec | StagedJob | GenerationJob


def any_job(plain: Mapping[str, Any]) -> AnyJob:
    """The job in plain data, whatever it does; raises ValidationError."""
    if is_service(plain):
        return ServiceSpec.model_validate(plain)
    if is_generation(plain):
        return GenerationJob.model_validate(plain)
    if is_staged(plain):
        return StagedJob.model_validate(plain)
    if "questions" in plain:
        return EvaluationJob.model_validate(plain)
    return Job.model_validate(plain)
