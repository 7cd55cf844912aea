"""What is applied to the namespace of a cluster of the clusters file."""

from clusters.kubernetes_config import KubernetesConfig
from clusters.pod_keeper import pass_command
from clusters.remote.code import installed_code
from k8s.install import BaseObject, install_manifests
from k8s.keeper import keeper_manifests
from orchestrator.backends import config_of
from orchestrator.errors import InputError


def manifests_for(name: str, storage: str | None, storage_class: str | None) -> list[BaseObject]:
    """The objects for a cluster by its name; raises InputError for one of another kind, or a wrong size."""
    try:
        config = _kubernetes(name)
        return install_manifests(config, config.root, storage, storage_class)
    except ValueError as error:
        raise InputError(str(error)) from None


def keeper_for(name: str) -> list[BaseObject]:
    """The objects of a cluster's keeper, which runs this version of Fleetune; raises InputError."""
    config = _kubernetes(name)
    code = f"{config.root}/code/{installed_code().digest}"
    return keeper_manifests(config, config.root, code, pass_command(config))


def plan_of_install(name: str, storage: str | None, storage_class: str | None) -> list[str]:
    """A line for each object that would be applied, in order, and one for the secret, whose text is shown nowhere."""
    lines = []
    for each in manifests_for(name, storage, storage_class):
        metadata = each["metadata"]
        place = f"{metadata['namespace']}/" if "namespace" in metadata else ""
        lines.append(f"{each['kind']} {place}{metadata['name']}")
    settings = _kubernetes(name)
    lines.append(f"Secret {settings.namespace}/{settings.ray_token} (a new token, where there is none)")
    return lines


def install(name: str, storage: str | None, storage_class: str | None) -> None:
    """Apply them; raises InputError with the commands that do so, as nothing is applied from here yet."""
    manifests_for(name, storage, storage_class)
    settings = _kubernetes(name)
    secret = f"kubectl -n {settings.namespace} create secret generic {settings.ray_token}"
    raise InputError(
        "fleetune k8s install: found no --dry-run, and nothing is applied from here yet; use kubectl:\n"
        f"  fleetune k8s manifests --cluster {name} | kubectl apply --server-side -f -\n"
        f'  {secret} --from-literal=auth_token="$(openssl rand -hex 32)"'
    )


def _kubernetes(name: str) -> KubernetesConfig:
    config = config_of(name)
    if not isinstance(config, KubernetesConfig):
        raise InputError(f"--cluster: found {name!r}, of kind {config.kind}; allowed: one of kind kubernetes")
    return config
