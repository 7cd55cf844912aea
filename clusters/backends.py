"""The kinds of clusters: a backend is one file, and one line here."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

from clusters.base import Cluster
from clusters.config import ClusterConfig

BACKENDS = {  # by `kind` in the clusters file
    "local": "clusters.local:Local",
    "slurm": "clusters.slurm:Slurm",
    "kubernetes": "clusters.kubernetes:Kubernetes",
}


class Backend(Protocol):
    """The class of a backend: what the clusters file says of such a cluster, and how one is opened."""

    Config: type[ClusterConfig]

    def open(self, config: Any, home: Path) -> Cluster:
        """The cluster whose machine this is, with its run folders in `home`/runs."""
        ...


def backend_of(kind: str) -> Backend:
    """The backend of a kind of clusters."""
    backend: Backend = resolve_name(BACKENDS[kind])
    return backend


def open_backend(config: ClusterConfig, home: Path) -> Cluster:
    """The cluster that a configuration describes, whose machine this is, with its run folders in `home`/runs."""
    backend = backend_of(config.kind)
    return backend.open(config, home)
