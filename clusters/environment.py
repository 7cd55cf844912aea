"""What a run takes along from the environment that it is submitted in: these names, and nothing else of it.

Other variables are for the job to say (`env:`). Secrets travel by name: their values go by a file that its owner
alone can read (runfolder/secrets.py), never in the text of a request. A setting with a password in it is one, too.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from runfolder.evaluation_job import AnyJob
from runfolder.variables import split_secrets

SETTINGS = (
    *("FLEETUNE_CACHE", "FLEETUNE_HANG_AFTER", "OMP_NUM_THREADS"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
    *("DATABRICKS_HOST", "DATABRICKS_CONFIG_FILE", "DATABRICKS_CONFIG_PROFILE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
SECRETS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("DATABRICKS_TOKEN", "DATABRICKS_USERNAME", "DATABRICKS_PASSWORD"),
    *("DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET"),
)
# What the supervisor, Ray and all controllers have of the shell that happened to start them: facts of the machine,
# the same for every run. CUDA_VISIBLE_DEVICES says which devices the cluster has.
_MACHINE = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "CC", "CXX"),
    *("CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
_FOLDERS = ("FLEETUNE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def run_settings(of_cluster: Mapping[str, str], job: AnyJob, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a cluster, and in their place those that a run gets by `settings`.

    What both say of PYTHONPATH is joined, the cluster's first: on other machines Fleetune's own code is there.
    """
    of_run = settings(job, environment)
    name = "PYTHONPATH"
    if name in of_cluster and name in of_run:
        first = of_cluster[name]
        then = of_run[name]
        of_run[name] = f"{first}:{then}"
    return {**of_cluster, **of_run}


def settings(job: AnyJob, environment: Mapping[str, str]) -> dict[str, str]:
    """What a run of this job gets of an environment, beside its secrets; folders as absolute paths."""
    present = _set_in(environment, SETTINGS)
    carried, _ = split_secrets(present)
    for name in _FOLDERS:
        if carried.get(name):
            folder = Path(carried[name]).expanduser()
            carried[name] = str(folder.absolute())
    return carried | dict(job.env)


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The secrets that an environment has, which a run takes along wherever it goes."""
    names = filter(environment.get, SECRETS)
    return tuple(names)


def secret_settings(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The settings that hold a secret, like a proxy with a password: they are for runs on the same machine alone."""
    present = _set_in(environment, SETTINGS)
    _, secret = split_secrets(present)
    return tuple(secret)


def secret_values(names: Iterable[str]) -> dict[str, str]:
    """The secrets of these names that this process's environment has."""
    return _set_in(os.environ, names)


def machine_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment is true of the machine, whoever's it is."""
    names = list(_MACHINE)
    for name in environment:
        if name.startswith("LC_"):
            names.append(name)
    return _set_in(environment, names)


def _set_in(environment: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The variables of these names that an environment has."""
    present = {}
    for name in names:
        if name in environment:
            present[name] = environment[name]
    return present
