"""What is applied to a cluster once, before its first run: the base in `manifests/`, under the names of a cluster."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from k8s.names import is_object_name
from k8s.planned import QUEUE_LABEL
from k8s.pods import placement
from k8s.settings import KubernetesSettings

BASE = Path(__file__).parent / "manifests" / "base"
_QUANTITY = re.compile(r"[1-9]\d{0,5}([KMGTP]i?)?")
_OF_BASE = "fleetune"  # the namespace that the base names
_POD_SECURITY = "pod-security.kubernetes.io/enforce"

BaseObject = dict[str, Any]


def install_manifests(
    settings: KubernetesSettings, home: str, storage: str | None = None, storage_class: str | None = None
) -> list[BaseObject]:
    """The objects of the base, in the order in which they are applied, under the names that the settings have.

    `home` is where pods have the volume, `storage` its size, `storage_class` its class; without them they are the
    base's, and the cluster's default. Raises ValueError for what is no size or no name.
    """
    if storage is not None and not _QUANTITY.fullmatch(storage):
        raise ValueError(f"--storage: found {storage!r}; allowed: a size like 500Gi or 2Ti")
    if storage_class is not None and not is_object_name(storage_class):
        raise ValueError(f"--storage-class: found {storage_class!r}; allowed: the name of a StorageClass")
    objects = []
    for each in base_objects(BASE):
        adapted = _renamed(each, settings)
        if adapted["kind"] == "PersistentVolumeClaim":
            _store(adapted["spec"], storage, storage_class)
        if adapted["kind"] == "Deployment":
            run_as(adapted["spec"]["template"]["spec"], settings, home)
            name_queue(adapted, settings)
        if adapted["metadata"]["name"] == "fleetune-outside":
            (outside,) = adapted["spec"]["egress"]
            outside["ports"] = [{"protocol": "TCP", "port": port} for port in settings.egress_ports]
        objects.append(adapted)
    return objects


def base_objects(folder: Path) -> Iterator[BaseObject]:
    """The objects in the files that a kustomization names, in its order."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        file = folder / name
        yield from yaml.safe_load_all(file.read_text())


def _store(volume: BaseObject, storage: str | None, storage_class: str | None) -> None:
    """Give the spec of a volume its size and its class, where they are said."""
    if storage:
        volume["resources"]["requests"]["storage"] = storage
    if storage_class:
        volume["storageClassName"] = storage_class


def name_queue(part: BaseObject, settings: KubernetesSettings) -> None:
    """Have Kueue admit what is no run from a queue of its own, where it manages every pod of the namespace."""
    if settings.reader_queue:
        metadata = part.setdefault("metadata", {})
        metadata["labels"] = {QUEUE_LABEL: settings.reader_queue}


def run_as(pod: BaseObject, settings: KubernetesSettings, home: str) -> None:
    """Have a pod that has the volume be like those of runs: of their image, user and account, with their volume."""
    pod["serviceAccountName"] = settings.service_account
    pod["securityContext"] |= dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), settings.user)
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    (container,) = pod["containers"]
    container["image"] = settings.image
    container["volumeMounts"][0]["mountPath"] = home
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = settings.volume
    head_pod = settings.head_pod
    pod |= placement(head_pod.node_selector, head_pod.tolerations)


def _renamed(base: BaseObject, settings: KubernetesSettings) -> BaseObject:
    """An object of the base, which has the default names, under those of the settings."""
    metadata = base["metadata"]
    kind = base["kind"]
    if kind == "Namespace":
        metadata["name"] = settings.namespace
        if settings.host_network:
            metadata["labels"][_POD_SECURITY] = "privileged"
        return base
    if "namespace" in metadata:
        metadata["namespace"] = settings.namespace
    if kind == "PersistentVolumeClaim":
        metadata["name"] = settings.volume
    if kind == "ServiceAccount" and metadata["name"] == "fleetune-run":
        metadata["name"] = settings.service_account
    if kind == "ClusterRoleBinding" and settings.namespace != _OF_BASE:
        metadata["name"] += f"-{settings.namespace}"  # every namespace has one of its own
    for subject in base.get("subjects", ()):
        subject["namespace"] = settings.namespace
    return base
