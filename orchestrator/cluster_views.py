"""The clusters that `--cluster` can name: what kind each is, what it has for workers, and what is wrong with it."""

from dataclasses import asdict, dataclass
from typing import Any

from clusters.base import Unreachable
from clusters.config import SshLink
from clusters.kubernetes_config import KubernetesConfig
from orchestrator.backends import CLUSTERS, open_cluster
from orchestrator.clusters_file import default_cluster, read_clusters


@dataclass(frozen=True)
class ClusterView:
    """One cluster; `capacity` is None where `trouble` says why it is not known."""

    name: str
    kind: str
    link: str
    is_default: bool
    capacity: str | None
    trouble: str | None

    def dump(self) -> dict[str, Any]:
        """The view as plain data, for JSON."""
        return asdict(self)


def cluster_views() -> list[ClusterView]:
    """All clusters: `local`, and those of the clusters file. Raises InputError where the file is wrong."""
    default = default_cluster()
    kinds = {name: (name, "this machine") for name in CLUSTERS}
    for name, config in read_clusters().items():
        link = config.link.ssh if isinstance(config.link, SshLink) else "this machine"
        if isinstance(config, KubernetesConfig):
            link = f"context {config.context}" if config.context else "the kubeconfig's context"
        kinds[name] = (config.kind, link)
    views = []
    for name, (kind, link) in kinds.items():
        capacity = trouble = None
        try:
            found = open_cluster(name).capacity()
            capacity = f"{found.free} of {found.total} {found.kind} free"
        except Unreachable as error:
            trouble = str(error)
        views.append(ClusterView(name, kind, link, name == default, capacity, trouble))
    return views
