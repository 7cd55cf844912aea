"""The RayJob of a submission, as KubeRay's operator takes it (ray.io/v1): a pure function, without a client.

One RayJob per submission, in HTTPMode: the operator itself hands the entrypoint to Ray, and hands it over again when
the head pod was replaced. It has no GPU; controller and driver run in it. The entrypoint exits 0 when the run is
closed, for good or ill, or when start after start made no attempt, and 1 when another attempt is due: KubeRay then
makes a new cluster, up to `backoffLimit` times. `activeDeadlineSeconds` is left out, as it is fatal and counts anew
with each of these clusters.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from k8s.planned import GANG_LABEL, QUEUE_LABEL, PlannedPods
from k8s.pods import head_template, worker_template
from k8s.settings import KubernetesSettings

LONGEST_NAME = 47  # characters: KubeRay starts nothing with a longer one
DIGEST_ANNOTATION = "fleetune/digest"
_RETRIES = 20  # new clusters for one submission; a preemption by Kueue counts for none
_STAYS_S = 60  # that the pods of a finished RayJob stay, for their logs
_ALL_READY_S = 1800  # until the pods are ready that are admitted or placed whole; then others are tried
_OBJECT_STORE_BYTES = 128 << 20  # nothing large goes through it

Manifest = dict[str, Any]


def rayjob(pods: PlannedPods, settings: KubernetesSettings) -> Manifest:
    """The whole manifest, with a digest of its `spec`; raises ValueError for a name that is too long for KubeRay."""
    if len(pods.name) > LONGEST_NAME:
        raise ValueError(f"found {pods.name!r}; allowed: at most {LONGEST_NAME} characters, which KubeRay starts")
    spec = {
        "submissionMode": "HTTPMode",
        "entrypoint": shlex.join(pods.entrypoint),
        "backoffLimit": _RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _STAYS_S,
        **_readiness_limit(settings),
        "rayClusterSpec": ray_cluster(pods, settings),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": pods.name,
            "namespace": settings.namespace,
            "labels": pods.labels | _queue_labels(settings),
            "annotations": {DIGEST_ANNOTATION: digest_of(spec)},
        },
        "spec": spec,
    }


def digest_of(spec: Mapping[str, Any]) -> str:
    """What tells one submission's `spec` from another's: sha256 in hexadecimal digits."""
    text = json.dumps(spec, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_noted(rayjob: Mapping[str, Any]) -> str:
    """The digest that a RayJob was made with; empty for one that is not Fleetune's."""
    digest: str = rayjob["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION, "")
    return digest


def _readiness_limit(settings: KubernetesSettings) -> dict[str, int]:
    """How long pods may take to be ready: where somebody keeps runs apart, those that do not fit are tried anew."""
    if settings.queue is None and not settings.gang_scheduling:
        return {}
    return {"preRunningDeadlineSeconds": _ALL_READY_S}


def _queue_labels(settings: KubernetesSettings) -> dict[str, str]:
    """What has a run start whole or not at all."""
    labels = {}
    if settings.queue:
        labels[QUEUE_LABEL] = settings.queue
    if settings.queue_priority:
        labels["kueue.x-k8s.io/priority-class"] = settings.queue_priority
    if settings.gang_scheduling:
        labels[GANG_LABEL] = "true"
    return labels


def ray_cluster(pods: PlannedPods, settings: KubernetesSettings) -> Manifest:
    """The cluster of Ray: a head pod that computes nothing, and a group of workers."""
    return {
        "rayVersion": pods.ray_version,
        "authOptions": {"mode": "token"},  # KubeRay makes one for each cluster, in a Secret that goes with it
        "headGroupSpec": {
            "rayStartParams": _start_options(cpus=0, gpus=0) | {"dashboard-host": "0.0.0.0"},
            "template": head_template(pods, settings),
        },
        "workerGroupSpecs": [_worker_group(pods, settings)],
    }


def _worker_group(pods: PlannedPods, settings: KubernetesSettings) -> Manifest:
    workers = pods.workers_per_node
    gpus = workers if pods.has_gpus else 0
    return {
        "groupName": "workers",
        "replicas": pods.nodes,
        "minReplicas": pods.nodes,
        "maxReplicas": pods.nodes,
        "rayStartParams": _start_options(cpus=workers * settings.cpus_per_worker, gpus=gpus),
        "template": worker_template(pods, settings),
    }


def _start_options(cpus: int, gpus: int) -> dict[str, str]:
    """Options of `ray start`. A node without cores gets no worker of the run."""
    return {
        "num-cpus": str(cpus),
        "num-gpus": str(gpus),
        "object-store-memory": str(_OBJECT_STORE_BYTES),
        "disable-usage-stats": "true",
    }
