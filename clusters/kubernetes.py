"""Kubernetes, through a kubeconfig alone: a submission is a RayJob of KubeRay, in the namespace of the runs."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from clusters.base import Cluster, ClusterRequest, SubmissionRefused, Unreachable, submission_name
from clusters.environment import settings
from clusters.kubernetes_config import KubernetesConfig, flaw_of_name
from clusters.remote.lock import installed_lock
from k8s.planned import PlannedPods
from k8s.rayjob import rayjob
from k8s.text import manifest_text
from runfolder.job import Job

_LONGEST_VARIABLES = 1 << 17  # characters: an object may have 1.5 MiB, and each variable is twice in it


@dataclass(frozen=True)
class Kubernetes:
    """A namespace of a Kubernetes cluster, whose claim is at `home` in its pods."""

    config: KubernetesConfig
    home: Path
    Config: ClassVar[type[KubernetesConfig]] = KubernetesConfig

    @staticmethod
    def open(config: KubernetesConfig, home: Path) -> Cluster:
        """The cluster that the clusters file describes; raises Unreachable, as nothing can be submitted there yet."""
        raise Unreachable(f"Kubernetes, namespace {config.namespace}: nothing can be submitted there yet ({home})")

    def request(self, job: Job, run_id: str, submission: int = 1, secrets: tuple[str, ...] = ()) -> ClusterRequest:
        """What would be submitted: the whole manifest. Raises SubmissionRefused."""
        name = submission_name(run_id, submission)
        run_dir = str(self.home / "runs" / run_id)
        python = [self.config.python or "python", "-P", "-m"]
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
            leaving=[*python, "clusters.pod_leaving", run_dir, str(grace_s)],
            ray_version=locked_ray(),
        )
        try:
            text = manifest_text(rayjob(pods, self.config))
        except ValueError as error:
            raise SubmissionRefused(f"submission: {error}") from None
        return ClusterRequest(run_id, submission, run_dir, text, secrets)

    def _variables(self, job: Job) -> dict[str, str]:
        """What head and workers have in their environment; raises SubmissionRefused for what no pod can have."""
        hub = f"{self.home}/cache/huggingface"  # not in a pod, which each of them would fill anew
        variables = {"HF_HOME": hub, **self.config.env, **settings(job, {}), "FLEETUNE_HOME": str(self.home)}
        for name in job.env:
            flaw = flaw_of_name(name)
            if flaw:
                raise SubmissionRefused(f"env: {flaw}")
        size = len(json.dumps(variables))
        if size > _LONGEST_VARIABLES:
            raise SubmissionRefused(f"env: found {size} characters; allowed: {_LONGEST_VARIABLES}")
        return variables


@cache
def locked_ray() -> str:
    """The version of Ray that runs have."""
    pinned = re.search(r"^ray==(\S+)", installed_lock().constraints, re.MULTILINE)
    assert pinned
    return pinned[1]
