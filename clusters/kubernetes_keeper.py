"""Runs that are open while no RayJob carries them: whoever looks makes the next submission, `<run_id>-s<n+1>`.

KubeRay gives a RayJob up that has used its retries, or whose head it could not reach for long, and somebody may
delete one. Two who make the next submission make one, as its name is taken then; and of two starts of a run the later
one works.
"""

import time
from collections.abc import Mapping
from typing import Any

from clusters.base import (
    Cluster,
    ClusterRequest,
    ClusterStatus,
    SubmissionRefused,
    Unreachable,
    number_of_submission,
    submission_name,
)
from clusters.kubernetes_answers import goes_on, is_invalid
from k8s.rayjob import DIGEST_ANNOTATION
from k8s.text import manifest_in
from runfolder.files import Damaged
from runfolder.record import job_in
from runfolder.snapshot import Snapshot

_FRUITLESS = 3  # submissions more than the run has attempts: then somebody has to look
_LOST_S = 600.0  # since its submission, until a run without a RayJob is lost; its client may be about to make that


def submit_again(cluster: Cluster, newest: Mapping[str, Any]) -> dict[str, ClusterStatus]:
    """Make the next submission of open runs whose newest RayJob, if they have one, does nothing any more.

    Gives how those stand that it was made for, or why it was not; others are left out. Raises Unreachable.
    """
    statuses: dict[str, ClusterStatus] = {}
    idle = []
    for run_id, rayjob in newest.items():
        if rayjob is None or not goes_on(rayjob):
            idle.append(run_id)
    if not idle:
        return statuses
    folders = cluster.site.snapshots(idle)
    for run_id, run in folders.items():
        number = due_submission(newest[run_id], run)
        if number is not None:
            statuses[run_id] = _submit(cluster, run_id, number, newest[run_id])
    return statuses


def due_submission(rayjob: Any, run: Snapshot) -> int | None:
    """The number of the submission that a run is due for, by its newest RayJob; None where it is due for none."""
    if run.damaged or run.result or run.cancelled:
        return None
    if rayjob is None:
        return 1 if time.time() - run.submitted > _LOST_S else None
    number = number_of_submission(rayjob["metadata"]["name"])
    is_fruitless = number - run.attempt >= _FRUITLESS
    return None if is_fruitless or is_invalid(rayjob) else number + 1


def _submit(cluster: Cluster, run_id: str, number: int, earlier: Any) -> ClusterStatus:
    """Submit a run again as it was submitted, which another version or another image of it is not.

    Without an earlier RayJob that is the submission behind all that have started: of two starts the later one works.
    """
    name = submission_name(run_id, number)
    try:
        job = job_in(cluster.site.record(run_id), f"run {run_id}: job.yaml")
        if earlier and not _is_as_submitted(earlier, cluster.request(job, run_id, number - 1)):
            why = "it was submitted by another version of Fleetune or of the clusters file"
            return ClusterStatus("unknown", f"its RayJob has ended, and {why}; fleetune resume submits it again")
        request = cluster.request(job, run_id, number if earlier else None)
        name = request.name
        cluster.submit(request)
    except (Damaged, SubmissionRefused, Unreachable) as error:
        return ClusterStatus("unknown", f"its RayJob has ended, and {name} was not submitted: {error}")
    return ClusterStatus("queued", f"its RayJob has ended, and it was submitted again: RayJob {name}")


def _is_as_submitted(rayjob: Any, request: ClusterRequest) -> bool:
    """Whether a RayJob was submitted as this installation would submit it."""
    annotations = rayjob["metadata"].get("annotations", {})
    manifest = manifest_in(request.text)
    of_ours = manifest["metadata"]["annotations"]
    digest = annotations.get(DIGEST_ANNOTATION)
    return bool(digest == of_ours[DIGEST_ANNOTATION])
