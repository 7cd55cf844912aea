"""The pods of a run, which keep to the `restricted` level of Kubernetes' Pod Security Standards."""

from collections.abc import Mapping
from typing import Any

from k8s.names import parse_secret_key, parse_taint
from k8s.planned import PlannedPods
from k8s.settings import KubernetesSettings, Selector

PodPart = dict[str, Any]

_DRAIN_S = 5  # that Ray has its workers drain when its pod is told to end
_AFTERWARDS_S = 15  # for the verdict, and for what ends the pod


def head_template(pods: PlannedPods, settings: KubernetesSettings) -> PodPart:
    """The pod of controller and driver."""
    head_pod = settings.head_pod
    memory = f"{head_pod.memory}Gi"
    resources = {"cpu": str(head_pod.cpus), "memory": memory}
    spec = _pod_spec(pods, settings, "ray-head", resources)
    spec |= placement(head_pod.node_selector, head_pod.tolerations)
    return _template(pods, spec)


def worker_template(pods: PlannedPods, settings: KubernetesSettings) -> PodPart:
    """The pod of a node's workers."""
    workers = pods.workers_per_node
    resources = {
        "cpu": str(workers * settings.cpus_per_worker),
        "memory": f"{workers * settings.memory_per_worker}Gi",
    }
    if pods.has_gpus:
        resources[settings.gpu_resource] = str(workers)
    for name, count in settings.extended_resources.items():
        resources[name] = str(count)
    spec = _pod_spec(pods, settings, "ray-worker", resources)
    return _template(pods, spec | placement(settings.node_selector, settings.tolerations))


def variables_of(pods: PlannedPods, settings: KubernetesSettings) -> list[PodPart]:
    """The variables of a container; secrets by reference, and those of the pod by its own fields."""
    variables: list[PodPart] = []
    for name, value in pods.environment.items():
        variables.append({"name": name, "value": unexpanded(value)})
    for name, text in settings.secrets.items():
        if name not in pods.environment:
            secret, key = parse_secret_key(text)
            variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    fields = {"FLEETUNE_POD": "metadata.name", "FLEETUNE_RAY_CLUSTER": "metadata.labels['ray.io/cluster']"}
    for name, field in fields.items():
        variables.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    variables.append({"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(_DRAIN_S)})
    variables.append({"name": "RAY_worker_niceness", "value": "0"})
    return variables


def unexpanded(value: str) -> str:
    """A value that Kubernetes, which replaces `$(NAME)` and takes `$$` for `$`, turns into this one."""
    return value.replace("$", "$$")


def _template(pods: PlannedPods, spec: PodPart) -> PodPart:
    return {"metadata": {"labels": pods.labels}, "spec": spec}


def _pod_spec(pods: PlannedPods, settings: KubernetesSettings, name: str, resources: Mapping[str, str]) -> PodPart:
    """What the head pod and workers have in common, but for where they may be."""
    spec: PodPart = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace_s + _DRAIN_S + _AFTERWARDS_S,
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user,
            "runAsGroup": settings.user,
            "fsGroup": settings.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(pods, settings, name, resources)],
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": settings.volume}},
            {"name": "tmp", "emptyDir": {}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shared_memory}Gi"},
            },
        ],
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return spec


def _container(pods: PlannedPods, settings: KubernetesSettings, name: str, resources: Mapping[str, str]) -> PodPart:
    """The container in which KubeRay starts Ray; its root is read-only, as Ray writes below /tmp alone."""
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "env": variables_of(pods, settings),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "lifecycle": {"preStop": {"exec": {"command": [*pods.leaving]}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "home", "mountPath": pods.home},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }


def placement(selector: Selector, tolerations: tuple[str, ...]) -> PodPart:
    """Where a pod may be: on nodes whose labels have one of these values each, and these taints at most."""
    placement: PodPart = {}
    fixed = {key: values[0] for key, values in selector.items() if len(values) == 1}
    if fixed:
        placement["nodeSelector"] = fixed
    choices = []
    for key, values in selector.items():
        if len(values) > 1:
            choices.append({"key": key, "operator": "In", "values": [*values]})
    if choices:
        terms = {"nodeSelectorTerms": [{"matchExpressions": choices}]}
        placement["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    if tolerations:
        placement["tolerations"] = [_toleration(text) for text in tolerations]
    return placement


def _toleration(text: str) -> PodPart:
    taint = parse_taint(text)
    toleration = {"key": taint.key, "operator": "Exists" if taint.value is None else "Equal"}
    if taint.value is not None:
        toleration["value"] = taint.value
    if taint.effect is not None:
        toleration["effect"] = taint.effect
    return toleration
