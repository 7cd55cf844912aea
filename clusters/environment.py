"""What a run takes along from the environment that it is submitted in: these names, and nothing else of it.

Other variables are for the job to say (`env:`). Secrets travel by name: their values go by a file that its owner
alone can read (runfolder/secrets.py), never in the text of a request.
"""

import os
import re
from collections.abc import Iterable, Mapping
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
# Of variables that a run may bring along, in `env:` too. The supervisor serves runs of many shells: it gives none of
# them what the shell had that happened to start it.
_PREFIXES = ("FLEETUNE_", "HF_", "HUGGING_FACE_", "MLFLOW_", "NCCL_", "AWS_")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_FOLDERS = ("FLEETUNE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def settings(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What a run of this job gets of an environment, beside its secrets; folders as absolute paths."""
    carried = {}
    for name in SETTINGS:
        if name in environment:
            carried[name] = environment[name]
    for name in _FOLDERS:
        if carried.get(name):
            folder = Path(carried[name]).expanduser()
            carried[name] = str(folder.absolute())
    return carried | dict(job.env)


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The secrets that an environment has."""
    secrets = []
    for name in SECRETS:
        if environment.get(name):
            secrets.append(name)
    return tuple(secrets)


def secret_values(names: Iterable[str]) -> dict[str, str]:
    """The secrets of these names that this process's environment has."""
    secrets = {}
    for name in names:
        if name in os.environ:
            secrets[name] = os.environ[name]
    return secrets


def can_be_variable(name: str, value: str) -> bool:
    """Whether every process and every shell can have a variable of this name with this value."""
    return bool(_VARIABLE.fullmatch(name)) and "\0" not in value


def without_carried(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for runs of anybody: without what each run brings along."""
    shared = {}
    for name, value in environment.items():
        if not _is_carried(name):
            shared[name] = value
    return shared


def _is_carried(name: str) -> bool:
    if name in SETTINGS or name in SECRETS:
        return True
    return name.startswith(_PREFIXES)
