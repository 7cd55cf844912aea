"""Kubernetes, through a kubeconfig alone: a submission is a RayJob of KubeRay, in the namespace of the runs.

That of a service is a RayService. The API is asked from this machine. Run folders are on a volume, which the pod of
the reader has: it answers for them with this same class, in `FLEETUNE_HOME` there.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from clusters.base import (
    Capacity,
    ClusterRequest,
    ClusterStatus,
    Logs,
    Standing,
    SubmissionRefused,
    Unreachable,
    look_at,
    submission_name,
)
from clusters.closing import close_cancelled
from clusters.environment import run_settings
from clusters.kubernetes_answers import goes_on, is_rayservice, runs_now
from clusters.kubernetes_api import KubernetesApi, Rejected
from clusters.kubernetes_config import KubernetesConfig, flaw_of_name
from clusters.kubernetes_keeper import ask_folders, note_try_in, submit_again
from clusters.kubernetes_look import OUR_OBJECTS, statuses_of
from clusters.kubernetes_nodes import capacity_of_nodes, nodes_of
from clusters.kubernetes_submissions import (
    Submitted,
    check_ours,
    check_same,
    manifest_of,
    newest_of,
    raised_for,
    submission_in,
    submissions_of_run,
)
from clusters.pod_link import PodLink
from clusters.pod_starts import is_pod
from clusters.remote.code import installed_code
from clusters.remote.far_side import FarSide
from clusters.remote.lock import installed_lock
from clusters.remote.machine import FarMachine
from clusters.remote.site import RemoteSite
from clusters.run_files import joined_logs
from k8s.planned import PlannedPods
from k8s.text import manifest_in, manifest_text
from runfolder.evaluation_job import AnyJob
from runfolder.service import ServiceSpec
from runfolder.site import LocalSite

_LONGEST_VARIABLES = 1 << 17  # characters: an object may have 1.5 MiB, and each variable is twice in it


@dataclass(frozen=True)
class Kubernetes:
    """A namespace of a Kubernetes cluster, whose volume is at `home` in its pods."""

    config: KubernetesConfig
    home: Path
    Config: ClassVar[type[KubernetesConfig]] = KubernetesConfig

    @cached_property
    def api(self) -> KubernetesApi:
        """The API server, which is asked with the first look at it."""
        config = self.config
        return KubernetesApi(config.context, config.namespace)

    @staticmethod
    def open(config: KubernetesConfig, home: Path) -> "Kubernetes":
        """The cluster that the clusters file describes."""
        return Kubernetes(config, home)

    @property
    def site(self) -> LocalSite | RemoteSite:
        """The run folders on the volume; a pod has it, and others ask the reader's."""
        if is_pod():
            return LocalSite(self.home / "runs")
        return RemoteSite(self._reader)

    def request(
        self, job: AnyJob, run_id: str, submission: int | None = 1, secrets: tuple[str, ...] = ()
    ) -> ClusterRequest:
        """What would be submitted: the whole manifest. Raises SubmissionRefused."""
        submission = submission or self._next_submission(run_id)
        name = submission_name(run_id, submission)
        run_dir = str(self.home / "runs" / run_id)
        python = [self.config.python or "python", "-P", "-m"]
        serves = isinstance(job, ServiceSpec)
        if serves and job.resources.walltime:
            raise SubmissionRefused(
                "resources.walltime: allowed for a service on Kubernetes: none, it lasts until cancelled"
            )
        nodes = job.resources.fewest_nodes
        grace_s = job.resources.grace
        pods = PlannedPods(
            name=name,
            run_id=run_id,
            submission=submission,
            home=str(self.home),
            nodes=nodes,
            workers_per_node=job.resources.workers_on_node,
            has_gpus=bool(job.resources.gpus_per_node),
            grace_s=grace_s,
            environment=self._variables(job),
            entrypoint=[*python, "clusters.pod_job", run_dir, name, str(nodes)],
            leaving=["true"] if serves else [*python, "clusters.pod_leaving", run_dir, str(grace_s)],
            ray_version=installed_lock().ray_version,
        )
        try:
            text = manifest_text(manifest_of(job, pods, self.config, run_dir))
        except ValueError as error:
            raise SubmissionRefused(f"submission: {error}") from None
        return ClusterRequest(run_id, submission, run_dir, text, secrets)

    def forecast(self, request: ClusterRequest) -> float | None:
        """None: no start is known. Raises SubmissionRefused, in the server's words, where it takes no such object."""
        try:
            self.api.create(manifest_in(request.text), is_trial=True)
        except Rejected as rejected:
            if rejected.status != 409:
                raise raised_for(rejected) from None
        return None

    def submit(self, request: ClusterRequest) -> None:
        """Have the RayJob or RayService made, unless the submission has one, or the run goes on by an earlier one.

        Raises Unreachable where it is not known to be made, and SubmissionRefused where the server does not take it,
        or has another one of that name.
        """
        manifest = manifest_in(request.text)
        for existing in submissions_of_run(self.api, request.run_id):
            if existing["metadata"]["name"] == request.name:
                return check_same(existing, manifest)
            if goes_on(existing):
                return check_ours(existing, manifest)
        note_try_in(self, request)  # before it is made
        try:
            self.api.create(manifest)
        except Rejected as rejected:
            made = self.api.found(manifest["kind"], request.name)  # a quota may be used up by this very submission
            if made is None:
                raise raised_for(rejected) from None
            check_same(made, manifest)
        return None

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run, by one list of RayJobs, or of RayServices where it has none: its newest one's.

        Why one waits is looked for further (kubernetes_look.py). An open run that nothing carries is submitted again
        (kubernetes_keeper.py).
        """
        wanted = self.newest_submissions(run_ids)
        statuses = statuses_of(self.api, self.config, wanted)
        with suppress(Unreachable):  # what the API says is known
            statuses |= submit_again(self, wanted)
        return statuses

    def newest_submissions(self, run_ids: Iterable[str]) -> dict[str, Submitted | None]:
        """The RayJob or RayService of each run's newest submission, None where there is none."""
        wanted = list(run_ids)
        return newest_of(self.api, wanted)

    def look(self, run_ids: Iterable[str] | None = None, in_full: bool = False) -> dict[str, Standing]:
        """How runs stand, None: all of the volume."""
        return look_at(self, run_ids, in_full)

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's entrypoints printed, the newest submission's after the others'."""
        if not is_pod():
            answer = self._reader.ask({"verb": "logs", "run_id": run_id, "offset": offset})
            return Logs(**answer)
        folder = self.home / "kubernetes"
        return joined_logs(folder.glob(f"{run_id}-s*.log"), offset)

    def cancel(self, run_id: str) -> None:
        """Remove the run's RayJobs that do not run yet, and close it where no controller runs that would.

        A RayService has no controller: it is removed whatever it does.
        """
        if is_pod():
            return close_cancelled(self.home / "runs" / run_id)
        for found in submissions_of_run(self.api, run_id):
            if goes_on(found) and (is_rayservice(found) or not runs_now(found)):
                self.api.delete(found)
        if not any(map(runs_now, submissions_of_run(self.api, run_id))):  # one may have started meanwhile
            self._reader.ask({"verb": "cancel", "run_id": run_id})
        return None

    def capacity(self) -> Capacity:
        """GPUs of the nodes, or their cores; free is what runs here leave of them. Raises CapacityNotTold."""
        nodes = nodes_of(self.api)
        pods = self.api.pods(OUR_OBJECTS)
        return capacity_of_nodes(nodes, pods, self.config.gpu_resource)

    def ask_reader(self, request: Mapping[str, Any]) -> Any:
        """What the reader's pod answers to a request (clusters/answer.py)."""
        return self._reader.ask(request)

    @property
    def machine(self) -> FarMachine:
        """The reader's pod, as a machine that runs scripts."""
        return self._reader.machine

    @cached_property
    def _reader(self) -> FarSide:
        """What answers for run folders in the reader's pod, by this version of Fleetune."""
        python = self.config.python or "python"
        config = self.config.model_copy(update={"python": python})
        link = PodLink(config.context, config.namespace)
        name = f"of kind kubernetes, namespace {config.namespace}"
        machine = FarMachine(name, link, config, installed_code(), installed_lock())
        return FarSide(machine)

    def _next_submission(self, run_id: str) -> int:
        """The number after those of the run's submissions that are there, and that have started it before."""
        latest: int = ask_folders(self, {"verb": "latest_start", "run_id": run_id})
        for found in submissions_of_run(self.api, run_id):
            number = submission_in(found)
            latest = max(latest, number)
        return latest + 1

    def _variables(self, job: AnyJob) -> dict[str, str]:
        """What all pods have in their environment; raises SubmissionRefused for what no pod can have."""
        hub = f"{self.home}/cache/huggingface"  # not in a pod, which each of them would fill anew
        code = f"{self.home}/code/{installed_code().digest}"
        variables = run_settings({"HF_HOME": hub, **self.config.env, "PYTHONPATH": code}, job, {})
        variables["FLEETUNE_HOME"] = str(self.home)
        for name in job.env:
            flaw = flaw_of_name(name)
            if flaw:
                raise SubmissionRefused(f"env: {flaw}")
        size = len(json.dumps(variables))
        if size > _LONGEST_VARIABLES:
            raise SubmissionRefused(f"env: found {size} characters; allowed: {_LONGEST_VARIABLES}")
        return variables
