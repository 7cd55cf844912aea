"""The clusters by the names that `--cluster` takes."""

import difflib
from collections.abc import Callable

from clusters.base import Cluster, ClusterRequest, SubmissionRefused
from clusters.local import Local
from orchestrator.errors import InputError
from runfolder.job import Job

# One line for each backend: its name, and how the one that is meant is opened.
CLUSTERS: dict[str, Callable[[], Cluster]] = {"local": Local.here}


def open_cluster(name: str) -> Cluster:
    """The cluster of a name; raises InputError for an unknown one."""
    if name in CLUSTERS:
        return CLUSTERS[name]()
    hint = ""
    nearest = difflib.get_close_matches(name, CLUSTERS, n=1)
    if nearest:
        hint = f"did you mean {nearest[0]!r}? "
    allowed = ", ".join(CLUSTERS)
    raise InputError(f"--cluster: found {name!r}; {hint}allowed: {allowed}")


def make_request(cluster: Cluster, job: Job, run_id: str, submission: int = 1) -> ClusterRequest:
    """What would be submitted; raises InputError for what the cluster can never serve."""
    try:
        return cluster.request(job, run_id, submission)
    except SubmissionRefused as error:
        raise InputError(str(error)) from None
