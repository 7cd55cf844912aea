"""The clusters by the names that `--cluster` takes."""

import difflib

from clusters.base import Cluster, Refused, Request
from clusters.local import Local
from orchestrator.errors import InputError
from runfolder.job import Job

NAMES = ("local",)


def open_cluster(name: str) -> Cluster:
    """The cluster of a name; raises InputError for an unknown one."""
    if name == "local":
        return Local.here()
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"--cluster: found {name!r}; {hint}allowed: {', '.join(NAMES)}")


def make_request(cluster: Cluster, job: Job, run_id: str, attempt: int = 1) -> Request:
    """What would be submitted; raises InputError for what the cluster can never serve."""
    try:
        return cluster.request(job, run_id, attempt)
    except Refused as error:
        raise InputError(str(error)) from None


def wake(cluster: Cluster) -> None:
    """Start a cluster that its first job starts; raises Unreachable where it cannot be."""
    if isinstance(cluster, Local):
        cluster.start()
