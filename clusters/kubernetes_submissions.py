"""What carries runs on Kubernetes, as the API has it: RayJobs, and RayServices for runs that serve."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clusters.base import SubmissionRefused, SubmittedOtherwise, Unreachable, number_of_submission, run_of_submission
from clusters.kubernetes_answers import title_of
from clusters.kubernetes_api import KubernetesApi, Rejected
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_look import OUR_OBJECTS
from k8s.planned import RUN_LABEL, PlannedPods
from k8s.rayjob import digest_noted, rayjob
from k8s.rayservice import rayservice
from runfolder.evaluation_job import AnyJob
from runfolder.service import ServiceSpec

_SUBMISSION = re.compile(r"[a-z].*-s[1-9]\d*", re.ASCII)

Submitted = dict[str, Any]  # a RayJob or a RayService


def manifest_of(spec: AnyJob, pods: PlannedPods, config: KubernetesConfig, run_dir: str) -> Submitted:
    """A RayJob for what trains, and a RayService for what serves; raises ValueError."""
    if not isinstance(spec, ServiceSpec):
        return rayjob(pods, config)
    arguments = spec.dump() | {"engines": pods.workers_per_node, "usage": f"{run_dir}/usage"}
    return rayservice(pods, config, arguments)


def all_submissions(api: KubernetesApi) -> list[Submitted]:
    """All of the namespace."""
    rayjobs = _submissions(api, "RayJob", OUR_OBJECTS)
    rayservices = _submissions(api, "RayService", OUR_OBJECTS)
    return rayjobs + rayservices


def submissions_of_run(api: KubernetesApi, run_id: str) -> list[Submitted]:
    """Those of a run that are still there; a run that has RayJobs has no RayService."""
    selector = f"{OUR_OBJECTS},{RUN_LABEL}={run_id}"
    rayjobs = _submissions(api, "RayJob", selector)
    return rayjobs or _submissions(api, "RayService", selector)


def newest_of(api: KubernetesApi, run_ids: Sequence[str]) -> dict[str, Submitted | None]:
    """The newest one of each run, None where there is none; RayServices are asked for where RayJobs lack."""
    if len(run_ids) == 1:
        run_id = run_ids[0]
        newest = _newest(submissions_of_run(api, run_id))
        return {run_id: newest.get(run_id)}
    rayjobs = _submissions(api, "RayJob", OUR_OBJECTS)
    newest = _newest(rayjobs)
    if not newest.keys() >= set(run_ids):
        rayservices = _submissions(api, "RayService", OUR_OBJECTS)
        newest |= _newest(rayservices)
    return {run_id: newest.get(run_id) for run_id in run_ids}


def submission_in(found: Mapping[str, Any]) -> int:
    """The number of an object among the submissions of its run."""
    return number_of_submission(found["metadata"]["name"])


def check_ours(existing: Submitted, manifest: Submitted) -> None:
    """Raise SubmissionRefused for an object that is none of this run, and so is somebody else's."""
    run_id = manifest["metadata"]["labels"][RUN_LABEL]
    labels = existing["metadata"].get("labels", {})
    if labels.get(RUN_LABEL) != run_id or not digest_noted(existing):
        title = title_of(existing)
        words = f"is there already, and is not of run {run_id}: somebody else has made it"
        raise SubmissionRefused(f"{title} {words}")


def check_same(existing: Submitted, manifest: Submitted) -> None:
    """Raise SubmissionRefused for an object that is not this submission, though it has its name."""
    check_ours(existing, manifest)
    if digest_noted(existing) != digest_noted(manifest):
        why = "it was made by another version of Fleetune or of the clusters file"
        run_id = run_of_submission(existing["metadata"]["name"])
        words = f"is there already, and not as this would make it: {why}; look at it: fleetune status {run_id}"
        raise SubmittedOtherwise(f"{title_of(existing)} {words}")


def raised_for(rejected: Rejected) -> Exception:
    """What to raise for what a server refused: that nobody knows, where a try before may have been taken."""
    if not rejected.is_first:
        return rejected
    if rejected.status == 404:
        return Unreachable(f"{rejected}: are KubeRay and the namespace there? see: fleetune doctor --cluster NAME")
    return SubmissionRefused(f"Kubernetes does not take this job: {rejected.message}")


def _submissions(api: KubernetesApi, kind: str, selector: str) -> list[Submitted]:
    """The objects of a kind with these labels that have the name of a submission."""
    submissions: list[Submitted] = []
    for each in api.listed(kind, selector):
        name = each["metadata"]["name"]
        if _SUBMISSION.fullmatch(name):
            submissions.append(each)
    return submissions


def _newest(found: Iterable[Submitted]) -> dict[str, Submitted]:
    """The newest one of each run, by its id."""
    newest: dict[str, Submitted] = {}
    for each in found:
        run_id = each["metadata"]["labels"].get(RUN_LABEL, "")
        earlier = newest.get(run_id)
        if earlier is None or submission_in(each) > submission_in(earlier):
            newest[run_id] = each
    return newest
