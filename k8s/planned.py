"""What a manifest is for, in plain data: the caller knows jobs, and the builder knows Kubernetes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RUN_LABEL = "fleetune/run"
SUBMISSION_LABEL = "fleetune/submission"
CLUSTER_LABEL = "ray.io/cluster"  # KubeRay's, of the pods of a cluster of Ray
GANG_LABEL = "ray.io/gang-scheduling-enabled"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # set by Kueue, too, where a namespace has a default queue
READER_LABEL = "fleetune/reader"  # of the pod that answers for run folders


@dataclass(frozen=True)
class PlannedPods:
    """What a manifest is for: a submission by name, its workers, its commands, and what it takes along.

    `entrypoint` runs in the head pod. `leaving` runs in a pod that is told to end; it asks for a checkpoint, and
    waits for that at most `grace_s` seconds and a little.
    """

    name: str
    run_id: str
    submission: int
    home: str  # where the volume is
    nodes: int
    workers_per_node: int
    has_gpus: bool
    grace_s: int
    environment: Mapping[str, str]
    entrypoint: Sequence[str]
    leaving: Sequence[str]
    ray_version: str

    @property
    def labels(self) -> dict[str, str]:
        """What all objects of the submission are found by."""
        return {
            "app.kubernetes.io/managed-by": "fleetune",
            RUN_LABEL: self.run_id,
            SUBMISSION_LABEL: str(self.submission),
        }
