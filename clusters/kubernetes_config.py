"""What the clusters file says of a Kubernetes cluster."""

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from clusters.config import ClusterConfig
from k8s.names import MountPath, PathInPod
from k8s.settings import KubernetesSettings
from runfolder.variables import flaw_of_variable

# What KubeRay and Ray set for themselves, and by which a pod knows what it is.
_OF_RAY = r"ADDRESS|AUTH_\w+|CLOUD_INSTANCE_ID|CLUSTER_NAME|IP|NODE_\w+|PORT|REDIS_ADDRESS|enable_autoscaler_v2"
_SET_IN_PODS = r"GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S|worker_niceness"
_NOT_OF_USERS = re.compile(rf"RAY_({_OF_RAY}|{_SET_IN_PODS})|FQ_RAY_IP|PATH")
_OF_OURS = re.compile(r"KUBERAY_\w+|REDIS_(PASSWORD|USERNAME)|FLEETUNE_(HOME|POD|RAY_CLUSTER|NODES|REQUEUED)")


class KubernetesConfig(KubernetesSettings, ClusterConfig):
    """A Kubernetes cluster, which is reached by the kubeconfig of this machine."""

    kind: Literal["kubernetes"]
    link: Literal["local"] = Field("local", description="local: the API is asked from this machine")
    root: MountPath = Field("/fleetune", description="where pods have the volume, and so the FLEETUNE_HOME there")
    python: PathInPod | None = Field(None, description="the Python of the image; null: the one on its PATH")

    @field_validator("setup")
    @classmethod
    def _has_none(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if lines:
            raise ValueError("no shell comes before Python in a pod; set up the image instead, or use env")
        return lines

    @field_validator("secrets")
    @classmethod
    def _are_variables(cls, secrets: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for name in secrets:
            flaw = flaw_of_variable(name, "") or flaw_of_name(name)
            if flaw:
                raise ValueError(flaw)
            if name in info.data.get("env", {}):
                raise ValueError(f"{name} is in env, too; allowed: in one of them")
        return secrets

    @field_validator("env")
    @classmethod
    def _are_of_users(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            flaw = flaw_of_name(name)
            if flaw:
                raise ValueError(flaw)
        return env


def flaw_of_name(name: str) -> str | None:
    """Why a variable of this name is not for a job or a cluster to set in a pod; None where it is."""
    if _NOT_OF_USERS.fullmatch(name) or _OF_OURS.fullmatch(name):
        return f"{name!r} is set in every pod by KubeRay, Ray or Fleetune: allowed are other names"
    return None
