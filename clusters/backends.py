"""The kinds of clusters: how each is opened on the machine where its run folders are."""

from pathlib import Path

from clusters.base import Cluster
from clusters.config import ClusterConfig
from clusters.local import Local
from clusters.slurm import Slurm


def open_backend(config: ClusterConfig, home: Path) -> Cluster:
    """The backend of a cluster whose machine this is, with its run folders in `home`/runs."""
    match config.kind:
        case "local":
            return Local(home, config.env)
        case "slurm":
            return Slurm(config, home)
