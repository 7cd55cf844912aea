"""What of a job is secret, which may be anywhere but in what others can read.

That is the tracking URI where it has a password, and variables of `env:`. All of it lies among the secrets of a run,
the URI under `TRACKING_URI`.
"""

from typing import overload

from runfolder.job import Job
from runfolder.service import AnyJob, ServiceSpec
from runfolder.variables import public, split_secrets

TRACKING_URI = "tracking.uri"  # the name among the secrets


def secrets_of(job: AnyJob) -> dict[str, str]:
    """What of a job, or of a service, is secret, by name."""
    _, secrets = split_secrets(job.env)
    if isinstance(job, ServiceSpec):
        return secrets
    uri = job.tracking.uri
    if uri and public(uri) != uri:
        secrets[TRACKING_URI] = uri
    return secrets


@overload
def without_secrets(job: Job) -> Job: ...


@overload
def without_secrets(job: AnyJob) -> AnyJob: ...


def without_secrets(job: AnyJob) -> AnyJob:
    """The job, or the service, as others may read it."""
    if not secrets_of(job):
        return job
    shown, _ = split_secrets(job.env)
    if isinstance(job, ServiceSpec):
        return job.model_copy(update={"env": shown})
    uri = job.tracking.uri
    tracking = job.tracking.model_copy(update={"uri": public(uri) if uri else uri})
    return job.model_copy(update={"tracking": tracking, "env": shown})
