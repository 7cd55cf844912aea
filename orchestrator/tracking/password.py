"""What of a job is secret, which may be anywhere but in what others can read.

That is the tracking URI where it has a password, and variables of `env:`. All of it lies among the secrets of a run,
the URI under `TRACKING_URI`.
"""

from typing import overload

from runfolder.evaluation_job import AnyJob, EvaluationJob
from runfolder.generation_job import GenerationJob
from runfolder.job import Job, Tracking
from runfolder.service import ServiceSpec
from runfolder.staged_job import StagedJob
from runfolder.variables import public, split_secrets

KINDS_TRACKED = (Job, StagedJob, GenerationJob)  # kinds of jobs that have an MLflow run
TRACKING_URI = "tracking.uri"  # the name among the secrets


def secrets_of(job: AnyJob) -> dict[str, str]:
    """What of a job is secret, by name."""
    _, secrets = split_secrets(job.env)
    uri = job.tracking.uri if isinstance(job, KINDS_TRACKED) else None
    if uri and public(uri) != uri:
        secrets[TRACKING_URI] = uri
    return secrets


@overload
def without_secrets(job: Job) -> Job: ...


@overload
def without_secrets(job: EvaluationJob) -> EvaluationJob: ...


@overload
def without_secrets(job: ServiceSpec) -> ServiceSpec: ...


@overload
def without_secrets(job: StagedJob) -> StagedJob: ...


@overload
def without_secrets(job: GenerationJob) -> GenerationJob: ...


def without_secrets(job: AnyJob) -> AnyJob:
    """The job as others may read it."""
    if not secrets_of(job):
        return job
    if isinstance(job, StagedJob):
        stages = {stage: without_secrets(its_job) for stage, its_job in job.stages.items()}
        job = job.model_copy(update={"stages": stages})
    shown, _ = split_secrets(job.env)
    return job.model_copy(update={"env": shown, **_public_tracking(job)})


def _public_tracking(job: AnyJob) -> dict[str, Tracking]:
    """The section `tracking` of a job without its password, by its name; nothing where the job has none."""
    if not isinstance(job, KINDS_TRACKED):
        return {}
    uri = job.tracking.uri
    tracking = job.tracking.model_copy(update={"uri": public(uri) if uri else uri})
    return {"tracking": tracking}
