"""Runs that are open while no RayJob carries them: whoever looks makes the next submission, `<run_id>-s<n+1>`.

A service is carried by a RayService; what is said of RayJobs is true of that, too. KubeRay gives a RayJob up that
has used its retries, or whose head it could not reach for long, and somebody may delete one. Two who make the next
submission make one, as its name is taken then; and of two starts of a run the later one works. A submission that was
broken off before it was tried is left to who did that, and a run that is to end is closed.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from clusters.base import ClusterRequest, ClusterStatus, SubmissionRefused, Unreachable, number_of_submission
from clusters.kubernetes_answers import goes_on, is_invalid
from clusters.pod_starts import HINDERED_STARTS, is_pod
from clusters.pod_submissions import Tried, answer_of_submissions
from k8s.rayjob import digest_noted
from k8s.text import manifest_in
from runfolder.files import Damaged
from runfolder.record import job_in
from runfolder.service import ServiceSpec
from runfolder.snapshot import Snapshot

if TYPE_CHECKING:
    from clusters.kubernetes import Kubernetes

_FRUITLESS = 3  # submissions more than the run has attempts: then somebody has to look
_LOST_S = 600.0  # since its submission, until a run without a RayJob is lost; its client may be about to make that
_BROKEN_OFF = "nobody has tried to submit it; fleetune resume does, fleetune cancel gives it up"


def submit_again(cluster: "Kubernetes", newest: Mapping[str, Any]) -> dict[str, ClusterStatus]:
    """Make the next submission of open runs whose newest RayJob, if they have one, does nothing any more.

    Those that are to end are closed. Gives how those stand for which something was done, or why it was not; others
    are left out. Raises Unreachable.
    """
    statuses: dict[str, ClusterStatus] = {}
    idle = []
    for run_id, rayjob in newest.items():
        if rayjob is None or not goes_on(rayjob):
            idle.append(run_id)
    if not idle:
        return statuses
    folders = cluster.site.snapshots(idle)
    gone = [run_id for run_id in folders if newest[run_id] is None]
    tried = _tried(cluster, gone) if gone else {}
    for run_id, run in folders.items():
        rayjob = newest[run_id]
        earlier = tried.get(run_id) or _tried_by(rayjob)
        if run.damaged or run.result:
            continue
        if run.cancelled:
            statuses[run_id] = _close(cluster, run_id)
        elif rayjob is None and run.looked_at - run.submitted <= _LOST_S:
            continue
        elif earlier.times == 0:
            statuses[run_id] = ClusterStatus("unknown", _BROKEN_OFF)
        elif is_due(earlier, run) and not (rayjob and is_invalid(rayjob)):
            statuses[run_id] = _submit(cluster, run_id, earlier, is_gone=rayjob is None)
    return statuses


def note_try_in(cluster: "Kubernetes", request: ClusterRequest) -> None:
    """Have the run's folder say that a submission is tried. Raises Unreachable."""
    digest = digest_in(request)
    noted = {"verb": "note_try", "run_id": request.run_id, "name": request.name, "digest": digest}
    ask_folders(cluster, noted)


def _tried(cluster: "Kubernetes", run_ids: Iterable[str]) -> dict[str, Tried]:
    """What was tried to submit each of these runs, as their folders say."""
    answers = ask_folders(cluster, {"verb": "tried", "run_ids": [*run_ids]})
    tried = {}
    for run_id, plain in answers.items():
        tried[run_id] = Tried(**plain)
    return tried


def ask_folders(cluster: "Kubernetes", request: Mapping[str, Any]) -> Any:
    """What the run folders say of submissions; a pod has them, and others ask the reader."""
    if not is_pod():
        return cluster.ask_reader(request)
    root = cluster.home / "runs"
    return answer_of_submissions(root, request)


def is_due(earlier: Tried, run: Snapshot) -> bool:
    """Whether a run is submitted again for which this was tried: not where that took it nowhere, again and again."""
    hindrance = run.hindrance
    if hindrance and hindrance["starts"] >= HINDERED_STARTS and hindrance["submission"] >= earlier.number:
        return False
    return earlier.times - run.attempt < _FRUITLESS


def _tried_by(rayjob: Any) -> Tried:
    """What was tried of a run with this newest RayJob."""
    metadata = rayjob["metadata"]
    number = number_of_submission(metadata["name"])
    return Tried(number, number, digest_noted(rayjob))


def _submit(cluster: "Kubernetes", run_id: str, earlier: Tried, is_gone: bool) -> ClusterStatus:
    """Submit a run again as it was submitted, which another version or another image of it is not.

    Without an earlier RayJob that is the submission behind all that have started: of two starts the later one works.
    """
    number = None if is_gone else earlier.number + 1
    name = "its next submission"
    what = "is gone" if is_gone else "has ended"
    kind = "RayJob"
    try:
        job = job_in(cluster.site.record(run_id), f"run {run_id}: job.yaml")
        if isinstance(job, ServiceSpec):
            kind = "RayService"
        if earlier.digest != digest_in(cluster.request(job, run_id, earlier.number)):
            why = "it was submitted by another version of Fleetune or of the clusters file"
            return ClusterStatus("unknown", f"its {kind} {what}, and {why}; fleetune resume submits it again")
        request = cluster.request(job, run_id, number)
        name = request.name
        cluster.submit(request)
    except (Damaged, SubmissionRefused, Unreachable) as error:
        return ClusterStatus("unknown", f"its {kind} {what}, and {name} was not submitted: {error}")
    return ClusterStatus("queued", f"its {kind} {what}, and it was submitted again: {kind} {name}")


def _close(cluster: "Kubernetes", run_id: str) -> ClusterStatus:
    """Close a run that is to end, and has no RayJob any more whose controller would."""
    try:
        cluster.cancel(run_id)
    except (Damaged, Unreachable) as error:
        return ClusterStatus("unknown", f"it is to end, and is not closed yet: {error}")
    return ClusterStatus("ended", "it was to end, and no controller was left for it: it is closed")


def digest_in(request: ClusterRequest) -> str:
    """The digest of what a request would have made."""
    return digest_noted(manifest_in(request.text))
