"""The clusters by the names that `--cluster` takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters.backends import open_backend
from clusters.base import Cluster, ClusterRequest, SubmissionRefused
from clusters.config import ClusterConfig, SshLink
from clusters.controllers import COLLECTED
from clusters.environment import secret_names
from clusters.local import Local
from clusters.remote.cluster import RemoteCluster
from clusters.remote.code import installed_code
from clusters.remote.far_side import FarSide
from clusters.remote.link import Link, Ssh, ThisHost
from clusters.remote.lock import Lock, installed_lock, plain_lock
from clusters.remote.machine import FarMachine
from orchestrator.clusters_file import clusters_path, read_clusters
from orchestrator.errors import InputError, JobRefused
from orchestrator.planning.spec_errors import did_you_mean
from orchestrator.tracking.password import secrets_of, without_secrets
from runfolder.evaluation_job import AnyJob
from runfolder.folders import home

# Clusters that need no file, by name; others are in the clusters file.
CLUSTERS: dict[str, Callable[[], Cluster]] = {"local": Local.here}
_opened: dict[tuple[str, str], Cluster] = {}  # of this process: a far side is started once


def open_cluster(name: str) -> Cluster:
    """The cluster of a name; raises InputError for an unknown one."""
    if name in CLUSTERS:
        return CLUSTERS[name]()
    config = config_of(name)
    key = (name, config.model_dump_json())
    if key not in _opened:
        _opened[key] = _open(name, config)
    return _opened[key]


def config_of(name: str) -> ClusterConfig:
    """What the clusters file says of a cluster; raises InputError for an unknown one."""
    configs = read_clusters()
    if name not in configs:
        known = [*CLUSTERS, *configs]
        allowed = ", ".join(known)
        hint = did_you_mean(name, known)
        raise InputError(f"--cluster: found {name!r}; {hint}allowed: {allowed} (others: in {clusters_path()})")
    return configs[name]


def link_of(name: str, config: ClusterConfig) -> Link:
    """The link to a cluster's machine."""
    if isinstance(config.link, SshLink):
        return Ssh(config.link.ssh, f"fleetune clusters connect {name}")
    return ThisHost()


def _open(name: str, config: ClusterConfig) -> Cluster:
    """A cluster of this machine in this process; one of another machine over its link."""
    if config.link == "local":
        root = root_of(config)
        if root != home():  # with an MLflow of its own
            config = config.model_copy(update={"env": config.env | COLLECTED})
        return open_backend(config, root)
    return RemoteCluster(FarSide(far_machine(name, config)))


def root_of(config: ClusterConfig) -> Path:
    """The run root of a cluster of this machine."""
    root = Path(config.root or "~/.fleetune")
    return root.expanduser().absolute()


def far_machine(name: str, config: ClusterConfig) -> FarMachine:
    """The machine of a cluster over its link, with the code and the packages of this installation."""
    link = link_of(name, config)
    code = installed_code()
    lock = lock_for(config)
    return FarMachine(name, link, config, code, lock)


def lock_for(config: ClusterConfig) -> Lock:
    """The packages that the Python of a cluster is to have."""
    return installed_lock() if config.trains_with_python else plain_lock()


def open_to_submit(cluster: str) -> Cluster:
    """A cluster that is going to get a submission: what answers there starts beside the checks here."""
    backend = open_cluster(cluster)
    backend.site.expect()
    return backend


def make_request(cluster: Cluster, job: AnyJob, run_id: str, submission: int | None = 1) -> ClusterRequest:
    """What would be submitted, None: as the run's next; raises JobRefused for what the cluster can never serve."""
    with _refused():
        of_environment = secret_names(os.environ)
        of_job = secrets_of(job)
        names = dict.fromkeys((*of_environment, *of_job))
        plain_job = without_secrets(job)
        return cluster.request(plain_job, run_id, submission, tuple(names))


def expected_start(cluster: Cluster, request: ClusterRequest) -> float | None:
    """In how many seconds a request would start, if that is known; raises JobRefused where it never would."""
    with _refused():
        return cluster.forecast(request)


@contextmanager
def _refused() -> Iterator[None]:
    """Within it, what a cluster refuses is an error of the input."""
    try:
        yield
    except SubmissionRefused as error:
        raise JobRefused(str(error)) from None
