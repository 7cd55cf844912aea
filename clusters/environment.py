"""What a run takes along from the environment that it is submitted in: these names, and nothing else of it.

Other variables are for the job to say (`env:`). Secrets travel by name: their values go by a file that its owner
alone can read (runfolder/secrets.py), never in the text of a request.
"""

from collections.abc import Mapping
from pathlib import Path

from runfolder.job import Job

SETTINGS = (
    *("FLEETUNE_CACHE", "FLEETUNE_HANG_AFTER"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
)
SECRETS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_FOLDERS = ("FLEETUNE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def settings(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What a run of this job gets of an environment, beside its secrets; folders as absolute paths."""
    taken = {name: environment[name] for name in SETTINGS if name in environment}
    folders = {name: str(Path(taken[name]).expanduser().absolute()) for name in _FOLDERS if taken.get(name)}
    return taken | folders | dict(job.env)


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The secrets that an environment has."""
    return tuple(name for name in SECRETS if environment.get(name))


def without_carried(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for runs of anybody: without what each run brings along."""
    return {name: value for name, value in environment.items() if name not in (*SETTINGS, *SECRETS)}
