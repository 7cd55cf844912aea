"""What the network policies of the base let pods of runs reach, as plugins of two kinds read them.

Calico and most others match the address of a packet. Cilium matches `ipBlock` against what is outside of the cluster
alone, and pods by selectors alone (its issue 19601).
"""

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from small_cluster import IMAGE
from test_rayjob import SHORT_JOB, manifest

from k8s.install import install_manifests
from k8s.settings import KubernetesSettings


@dataclass(frozen=True)
class Peer:
    """Who is to be reached: a pod by namespace and labels, else an address alone."""

    address: str
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()


NODE_LOCAL_DNS = Peer("169.254.20.10")
SERVICE_OF_DNS = Peer("34.118.224.10")  # as NodeLocal DNSCache answers for it, no pod is behind it
DNS_OF_OPENSHIFT = Peer("10.128.0.4", "openshift-dns", (("dns.operator.openshift.io/daemonset-dns", "default"),))
CORE_DNS = Peer("10.244.0.3", "kube-system", (("k8s-app", "kube-dns"),))
MLFLOW = Peer("10.244.1.7", "tracking", (("app", "mlflow"),))
PROXY = Peer("10.244.1.9", "egress", (("app", "squid"),))
HUB = Peer("52.84.10.1")
METADATA = Peer("169.254.169.254")


def policies(**changes: Any) -> list[dict[str, Any]]:
    """The policies that are about a pod of a run."""
    labels = manifest(SHORT_JOB)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    settings = KubernetesSettings.model_validate({"image": IMAGE, **changes})
    found = [each for each in install_manifests(settings, "/fleetune") if each["kind"] == "NetworkPolicy"]
    return [each for each in found if each["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]


def is_let(found: list[dict[str, Any]], peer: Peer, port: int, protocol: str, by_cilium: bool) -> bool:
    """Whether one of some policies lets a packet out."""
    for policy in found:
        for rule in policy["spec"].get("egress", []):
            ports = [(each["protocol"], each["port"]) for each in rule.get("ports", [])]
            is_port = not ports or (protocol, port) in ports
            is_peer = "to" not in rule or any(is_meant(each, peer, by_cilium) for each in rule["to"])
            if is_port and is_peer:
                return True
    return False


def is_meant(place: dict[str, Any], peer: Peer, by_cilium: bool) -> bool:
    """Whether an entry of `to` is about somebody."""
    if "ipBlock" in place:
        if by_cilium and peer.namespace:
            return False
        address = ip_address(peer.address)
        but = place["ipBlock"].get("except", [])
        within = address in ip_network(place["ipBlock"]["cidr"])
        return within and not any(address in ip_network(each) for each in but)
    namespaces = place.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "fleetune"}})
    wanted = namespaces.get("matchLabels", {})
    is_namespace = bool(peer.namespace) and wanted.items() <= {"kubernetes.io/metadata.name": peer.namespace}.items()
    labels = place.get("podSelector", {}).get("matchLabels", {})
    return is_namespace and labels.items() <= dict(peer.labels).items()


@pytest.mark.parametrize("by_cilium", [False, True], ids=["by address", "by selector"])
@pytest.mark.parametrize(
    ("peer", "port", "protocol", "changes", "is_reached"),
    [
        (CORE_DNS, 53, "UDP", {}, True),
        (NODE_LOCAL_DNS, 53, "UDP", {}, True),
        (NODE_LOCAL_DNS, 53, "TCP", {}, True),
        (SERVICE_OF_DNS, 53, "UDP", {}, True),
        (DNS_OF_OPENSHIFT, 5353, "UDP", {}, True),
        (HUB, 443, "TCP", {}, True),
        (MLFLOW, 5000, "TCP", {}, True),
        (MLFLOW, 8080, "TCP", {}, False),
        (MLFLOW, 8080, "TCP", {"egress_ports": [443, 8080]}, True),
        (PROXY, 3128, "TCP", {}, False),
        (PROXY, 3128, "TCP", {"egress_ports": [443, 3128]}, True),
        (MLFLOW, 5000, "TCP", {"egress_ports": [443, 3128]}, False),
        (MLFLOW, 5000, "UDP", {}, False),
        (METADATA, 80, "TCP", {"egress_ports": [80]}, False),
        (METADATA, 443, "TCP", {}, False),
        (HUB, 22, "TCP", {}, False),
    ],
)
def test_pods_reach_names_hub_mlflow_and_a_proxy_and_nothing_else(
    peer: Peer, port: int, protocol: str, changes: dict[str, Any], is_reached: bool, by_cilium: bool
) -> None:
    assert is_let(policies(**changes), peer, port, protocol, by_cilium) == is_reached


@pytest.mark.parametrize("ports", [[0], [65536], [], [443, 443]])
def test_ports_that_are_none_are_refused(ports: list[int]) -> None:
    with pytest.raises(ValueError, match="egress_ports"):
        policies(egress_ports=ports)
