"""What is applied to the namespace of a cluster of the clusters file."""

from collections.abc import Callable

from clusters.kubernetes_api import KubernetesApi
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_install import Applied, apply_all, place_of
from clusters.pod_keeper import pass_command
from clusters.remote.code import installed_code
from k8s.install import BaseObject, install_manifests
from k8s.keeper import keeper_manifests
from orchestrator.backends import config_of
from orchestrator.errors import InputError


def manifests_for(name: str, storage: str | None, storage_class: str | None) -> list[BaseObject]:
    """The objects for a cluster by its name; raises InputError for one of another kind, or a wrong size."""
    try:
        config = kubernetes_config(name)
        return install_manifests(config, config.root, storage, storage_class)
    except ValueError as error:
        raise InputError(str(error)) from None


def keeper_for(name: str) -> list[BaseObject]:
    """The objects of a cluster's keeper, which runs this version of Fleetune; raises InputError."""
    config = kubernetes_config(name)
    home = config.root
    code = f"{home}/code/{installed_code().digest}"
    command = pass_command(config)
    return keeper_manifests(config, home, code, command)


def plan_of_install(name: str, storage: str | None, storage_class: str | None) -> list[str]:
    """A line for each object that would be applied, in order."""
    lines = []
    for manifest in manifests_for(name, storage, storage_class):
        place = place_of(manifest)
        lines.append(f"{manifest['kind']} {place}")
    return lines


def install(
    name: str,
    storage: str | None,
    storage_class: str | None,
    tell: Callable[[Applied], object] = lambda _: None,
    takes_over: bool = False,
) -> list[Applied]:
    """Apply them; `tell` hears of each. Repeated, it changes what differs alone.

    What others have made is left as it is, unless it is to be taken over.
    Raises Unreachable, and InputError where something was refused.
    """
    manifests = manifests_for(name, storage, storage_class)
    settings = kubernetes_config(name)
    api = KubernetesApi(settings.context, settings.namespace)
    done = []
    for applied in apply_all(api, manifests, storage, takes_over):
        tell(applied)
        done.append(applied)
    refused = [applied for applied in done if applied.outcome == "refused"]
    if refused:
        lines = [f"the server refused {len(refused)} of {len(done)}; what else there is was applied:"]
        lines += map(str, refused)
        raise InputError("\n".join(lines))
    return done


def kubernetes_config(name: str) -> KubernetesConfig:
    """What the clusters file says of a Kubernetes cluster; raises InputError for one of another kind."""
    config = config_of(name)
    if not isinstance(config, KubernetesConfig):
        raise InputError(f"--cluster: found {name!r}, of kind {config.kind}; allowed: one of kind kubernetes")
    return config
