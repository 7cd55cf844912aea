"""What a look at a Kubernetes cluster finds, by asking it for what runs will ask it for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clusters.base import Unreachable
from clusters.checks import Check
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from clusters.pod_exec import reader_pod


@dataclass(frozen=True)
class _Look:
    """Something that is asked for, and how to fix it where that is not there."""

    name: str
    ask: Callable[[], str]
    mend: str


def kubernetes_checks(name: str, config: KubernetesConfig, home: Path) -> list[Check]:
    """Look at API and operator, nodes, reader and claim; after one that fails, at what does not need it."""
    cluster = Kubernetes(config, home)
    install = f"fleetune k8s manifests --cluster {name} | kubectl apply --server-side -f -"
    return [
        _checked_look(look)
        for look in (
            _Look("operator", lambda: _rayjobs(cluster), f"install KubeRay 1.6 or newer; {install}"),
            _Look("nodes", lambda: _nodes(cluster), f"allow to list nodes: {install}"),
            _Look("reader", lambda: f"pod {reader_pod(cluster.api)} is ready", install),
            _Look("claim", lambda: _runs(cluster), f"see: kubectl -n {config.namespace} describe pvc {config.claim}"),
        )
    ]


def _checked_look(look: _Look) -> Check:
    try:
        return Check(look.name, "ok", look.ask())
    except Unreachable as error:
        return Check(look.name, "fail", str(error), look.mend)


def _rayjobs(cluster: Kubernetes) -> str:
    count = len(cluster.api.rayjobs(""))
    return f"namespace {cluster.config.namespace} has {count} RayJobs"


def _nodes(cluster: Kubernetes) -> str:
    capacity = cluster.capacity()
    if capacity.kind == "cpu":
        return f"no node has {cluster.config.gpu_resource}; {capacity.total} cores"
    return f"{capacity.total} of {cluster.config.gpu_resource}, {capacity.free} not asked for here"


def _runs(cluster: Kubernetes) -> str:
    count = len(cluster.site.ids())
    return f"{count} runs in {cluster.home}/runs"
