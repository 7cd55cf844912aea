"""What the nodes of a Kubernetes cluster have for runs: how much, what of that is free, and who may not be there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from clusters.base import Capacity, CapacityNotTold
from clusters.kubernetes_api import ApiObject, KubernetesApi, Rejected
from clusters.kueue import Answered
from k8s.names import Taint, parse_taint
from k8s.settings import Selector

_QUANTITY_UNITS = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}
_NVIDIA = "nvidia.com/gpu"  # what the labels of its GPU feature discovery begin with
_KEEPING_OFF = ("NoSchedule", "NoExecute")


def nodes_of(api: KubernetesApi) -> list[ApiObject]:
    """The nodes of a cluster; raises CapacityNotTold where this account may not see them."""
    try:
        return api.nodes()
    except Rejected as rejected:
        if rejected.status != 403:
            raise
        raise CapacityNotTold(str(rejected)) from None


def capacity_of_nodes(nodes: Iterable[Answered], pods: Iterable[Answered], gpu_resource: str) -> Capacity:
    """GPUs of nodes that take pods, or their cores where they have none; free is what these pods do not ask for."""
    open_nodes = [node for node in nodes if not _why_closed(node)]
    kind: Literal["gpu", "cpu"] = "gpu"
    resource = gpu_resource
    total = _amount_of(open_nodes, resource)
    if not total:
        kind = resource = "cpu"
        total = _amount_of(open_nodes, resource)
    used = 0.0
    for pod in pods:
        is_there = pod["status"].get("phase") in ("Pending", "Running")
        if is_there and pod["spec"].get("nodeName"):
            used += _asked_for(pod, resource)
    free = max(0, int(total - used))
    if kind == "cpu":
        return Capacity(kind, int(total), free)
    with_gpus = [node for node in open_nodes if _amount_of([node], resource)]
    return Capacity(kind, int(total), free, _gpu_name(with_gpus), _gpu_bytes(with_gpus))


def _gpu_name(nodes: Iterable[Answered]) -> str | None:
    """What the GPUs of nodes are called by NVIDIA's labels; None where some have none, or another one."""
    label = f"{_NVIDIA}.product"
    names = {_labels_of(node).get(label) for node in nodes}
    if len(names) != 1:
        return None
    return names.pop()


def _gpu_bytes(nodes: Iterable[Answered]) -> int | None:
    """The memory of the smallest GPU of nodes by NVIDIA's labels, which are in MiB; None where some have none."""
    sizes = []
    for node in nodes:
        mebibytes = _labels_of(node).get(f"{_NVIDIA}.memory", "")
        if not mebibytes.isdigit():
            return None
        sizes.append(int(mebibytes) * 2**20)
    return min(sizes, default=None)


def _labels_of(node: Answered) -> Mapping[str, str]:
    metadata = node["metadata"]
    labels: Mapping[str, str] | None = metadata.get("labels")
    return labels or {}


def unfit_nodes(nodes: Iterable[Answered], selector: Selector, tolerations: Sequence[str]) -> list[str]:
    """Nodes on which no worker may be: the name of each, and why."""
    tolerated = [parse_taint(text) for text in tolerations]
    unfit = []
    for node in nodes:
        why = _why_closed(node) or _why_not_chosen(node, selector) or _why_kept_off(node, tolerated)
        if why:
            unfit.append(f"{node['metadata']['name']} {why}")
    return unfit


def quantity(text: str) -> float:
    """The number of a quantity, like `4`, `3920m` or `2Ti`; raises ValueError for what is none."""
    number = text.rstrip("KMGTPkmi")
    suffix = text[len(number) :]
    return float(number) * _QUANTITY_UNITS[suffix]


def _amount_of(nodes: Iterable[Answered], resource: str) -> float:
    """What nodes have of a resource for pods."""
    total = 0.0
    for node in nodes:
        allocatable = node["status"].get("allocatable", {})  # a new node has none yet
        amount = allocatable.get(resource, "0")
        total += quantity(amount)
    return total


def _asked_for(pod: Answered, resource: str) -> float:
    """What a pod asks for of a resource."""
    total = 0.0
    for container in pod["spec"]["containers"]:
        resources = container.get("resources", {})
        requests = resources.get("requests", {})
        amount = requests.get(resource, "0")
        total += quantity(amount)
    return total


def _why_closed(node: Answered) -> str:
    """Why a node takes no pods now; empty where it does."""
    conditions = node["status"].get("conditions", [])
    states = {}
    for condition in conditions:
        states[condition["type"]] = condition["status"]
    if states.get("Ready") != "True":
        return "is not ready"
    if node["spec"].get("unschedulable"):
        return "is cordoned"
    return ""


def _why_not_chosen(node: Answered, selector: Selector) -> str:
    """Which label of a node is none of those that are chosen; empty where all are."""
    labels = node["metadata"].get("labels", {})
    for key, values in selector.items():
        if labels.get(key) not in values:
            return f"has no label {key}={' or '.join(values)}"
    return ""


def _why_kept_off(node: Answered, tolerated: Sequence[Taint]) -> str:
    """Which taint of a node is not tolerated; empty where none keeps pods off."""
    for taint in node["spec"].get("taints", []):
        effect = taint["effect"]
        is_tolerated = any(_tolerates(each, taint) for each in tolerated)
        if effect in _KEEPING_OFF and not is_tolerated:
            key, value = taint["key"], taint.get("value", "")
            return f"has the taint {key}={value}:{effect}"
    return ""


def _tolerates(tolerated: Taint, taint: Answered) -> bool:
    """Whether a toleration is for a taint."""
    if tolerated.key != taint["key"]:
        return False
    value = taint.get("value", "")
    if tolerated.value not in (None, value):
        return False
    effect = taint["effect"]
    return tolerated.effect in (None, effect)
