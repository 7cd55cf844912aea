"""What is left in a namespace by clients that were killed, and by runs that have ended; never what is live.

RayJobs are left over by what the folder of their run says, as it is the one truth: KubeRay removes the pods of a
finished RayJob, and not the RayJob.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from clusters.base import number_of_submission
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_answers import goes_on, is_rayservice, runs_now, title_of
from clusters.kubernetes_look import OUR_OBJECTS
from clusters.kubernetes_submissions import all_submissions
from clusters.kueue import Answered
from clusters.remote.leftovers import HomeLeftover
from k8s.planned import CLUSTER_LABEL, RUN_LABEL
from runfolder.snapshot import Snapshot


@dataclass(frozen=True)
class Leftover:
    """Something that nobody needs: what it is, and why; where we may not remove it, the command that does."""

    what: str
    why: str
    size: int = 0
    by_hand: str = ""
    rayjob: Mapping[str, Any] | None = None
    path: str = ""  # below FLEETUNE_HOME


def leftovers_of(cluster: Kubernetes) -> list[Leftover]:
    """All that is left over on a cluster. Raises Unreachable, and nothing is known then."""
    pods = cluster.api.pods(OUR_OBJECTS)  # before their RayJobs: those of a pod are listed after it
    rayjobs = all_submissions(cluster.api)
    run_ids = cluster.site.ids()
    snapshots = cluster.site.snapshots(run_ids)
    found = [*_rayjobs(rayjobs, snapshots)]
    found += _without_rayjob(cluster, pods, rayjobs)
    for plain in cluster.ask_reader({"verb": "leftovers"}):
        found.append(_of_home(cluster, HomeLeftover(**plain)))
    return found


def remove_found(cluster: Kubernetes, found: Iterable[Leftover]) -> list[Leftover]:
    """Remove what can be removed and is left over still; gives that. Raises Unreachable; repeating it is safe."""
    paths = []
    names = []
    for leftover in found:
        if leftover.path:
            paths.append(leftover.path)
        if leftover.rayjob:
            names.append(leftover.what)
    removed = []
    for leftover in leftovers_of(cluster):
        if leftover.rayjob and leftover.what in names:
            cluster.api.delete({**leftover.rayjob})
            removed.append(leftover)
    for plain in cluster.ask_reader({"verb": "remove_leftovers", "paths": paths}):
        removed.append(_of_home(cluster, HomeLeftover(**plain)))
    return removed


def remove_finished(cluster: Kubernetes, snapshots: Mapping[str, Snapshot]) -> list[str]:
    """Remove RayJobs that do nothing any more for longer than the clusters file keeps them, and nobody needs.

    Gives their names. Raises Unreachable; repeating it is safe.
    """
    removed = []
    rayjobs = all_submissions(cluster.api)
    for leftover in _rayjobs(rayjobs, snapshots):
        found = leftover.rayjob
        if found and not goes_on(found) and _ended_days_ago(found) > cluster.config.keep_finished:
            cluster.api.delete({**found})
            removed.append(found["metadata"]["name"])
    return removed


def _ended_days_ago(rayjob: Answered) -> float:
    """For how many days a RayJob has been over, by the server's own times."""
    status = rayjob.get("status") or {}
    noted = status.get("endTime") or rayjob["metadata"]["creationTimestamp"]
    ended = datetime.fromisoformat(noted)
    age = datetime.now(UTC) - ended
    return age / timedelta(days=1)


def _rayjobs(rayjobs: Iterable[Answered], snapshots: Mapping[str, Snapshot]) -> Iterator[Leftover]:
    """RayJobs that are over, or wait, for runs that do not need them."""
    newest: dict[str, int] = {}
    by_number = []
    for rayjob in rayjobs:
        name = rayjob["metadata"]["name"]
        run_id = rayjob["metadata"]["labels"].get(RUN_LABEL, "")
        number = number_of_submission(name)
        newest[run_id] = max(number, newest.get(run_id, 0))
        by_number.append((run_id, number, rayjob))
    for run_id, number, rayjob in by_number:
        if is_rayservice(rayjob) and not goes_on(rayjob):
            continue  # somebody has removed it already
        run = snapshots.get(run_id)
        if run is None or run.damaged or (runs_now(rayjob) and not is_rayservice(rayjob)):
            continue  # what nobody can read says nothing, and who runs sees for itself that its run has ended
        why = ""
        if run.result is not None:
            why = "its run has ended, and it goes on" if goes_on(rayjob) else "its run has ended"
        elif number < newest[run_id] and not goes_on(rayjob):
            why = "its run goes on by a later one"
        if why:
            yield Leftover(title_of(rayjob), why, rayjob=rayjob)


def _without_rayjob(cluster: Kubernetes, pods: Iterable[Answered], rayjobs: Iterable[Answered]) -> Iterator[Leftover]:
    """Clusters of Ray whose RayJob was removed without them: they hold nodes, and nobody will end them."""
    there = {rayjob["metadata"]["labels"].get(RUN_LABEL) for rayjob in rayjobs}
    seen = set()
    for pod in pods:
        metadata = pod["metadata"]
        labels = metadata["labels"]
        name = labels.get(CLUSTER_LABEL)
        run_id = labels.get(RUN_LABEL)
        phase = pod["status"].get("phase")
        is_live = phase in ("Pending", "Running") and "deletionTimestamp" not in metadata
        is_known = run_id in there or name in seen
        if name and run_id and is_live and not is_known:
            seen.add(name)
            command = f"kubectl -n {cluster.config.namespace} delete raycluster {name}"
            yield Leftover(f"RayCluster {name}", f"run {run_id} has no RayJob any more", by_hand=command)


def _of_home(cluster: Kubernetes, found: HomeLeftover) -> Leftover:
    """What is left over below FLEETUNE_HOME, on the volume."""
    path = found.path
    name = f"{cluster.home}/{path}"
    return Leftover(name, found.why, found.size, path=path)
