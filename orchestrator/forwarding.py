"""How a service on a cluster is reached from this machine."""

import shlex

from clusters.config import SshLink
from clusters.kubernetes_config import KubernetesConfig
from orchestrator.backends import config_of
from orchestrator.errors import InputError

LAPTOP_PORT = 8000


def forwarding(cluster: str, address: str) -> str:
    """The command that brings a service's address to this machine's port 8000; its own one where none is needed.

    The login node reaches what its nodes listen on, and OpenSSH brings it here. What only a Kubernetes cluster
    reaches, kubectl does.
    """
    try:
        config = config_of(cluster)
    except InputError:  # the cluster of this machine, or one that the clusters file has no more
        return address
    place = address.removeprefix("http://")
    then = f"    # then http://127.0.0.1:{LAPTOP_PORT}"
    if isinstance(config, KubernetesConfig):
        return _kubectl(config, place) + then
    if not isinstance(config.link, SshLink):
        return address
    destination = shlex.quote(config.link.ssh)
    return f"ssh -N -L {LAPTOP_PORT}:{place} {destination}{then}"


def _kubectl(config: KubernetesConfig, place: str) -> str:
    """How kubectl brings the Service of a place NAME.NAMESPACE.svc:PORT here."""
    host, _, port = place.partition(":")
    name, _, _ = host.partition(".")
    service = f"service/{name}"
    ports = f"{LAPTOP_PORT}:{port}"
    words = ["kubectl"]
    if config.context:
        words += ["--context", config.context]
    words += ["-n", config.namespace, "port-forward", service, ports]
    return shlex.join(words)
