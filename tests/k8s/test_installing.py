"""`fleetune k8s install` against a server that applies, refuses, and knows whose fields are whose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Cluster, served, write_kubeconfig
from general_objects import strict_problems
from pod_security import broken_rules
from small_cluster import IMAGE
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from k8s.install import BASE, base_objects
from k8s.settings import KubernetesSettings
from orchestrator.cli import app
from orchestrator.errors import InputError

OVERLAYS = sorted((BASE.parent / "overlays").iterdir())
CLAIM = "/api/v1/namespaces/research/persistentvolumeclaims/fleetune"


@pytest.fixture
def cluster() -> Cluster:
    """A cluster without anything of ours."""
    return Cluster(namespace="research")


@pytest.fixture(autouse=True)
def laptop(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The laptop of an administrator."""
    plain = {"kind": "kubernetes", "image": IMAGE}
    clusters = {"k8s": plain | {"namespace": "research"}, "second": plain | {"namespace": "teaching"}}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with served(cluster) as address:
        write_kubeconfig(tmp_path / "kubeconfig", address)
        yield


def install(*options: str) -> dict[str, str]:
    """What the command says of each object: by kind and place, the outcome."""
    ran = CliRunner().invoke(app, ["k8s", "install", "--cluster", "k8s", *options])
    if ran.exception and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0
    return dict(line.split(": ", 1) for line in ran.stdout.splitlines())


def stored(cluster: Cluster, path: str) -> dict[str, Any]:
    return cluster.general.stored[path]


def test_it_makes_all_once_and_then_nothing(cluster: Cluster) -> None:
    first = install()
    assert len(first) == len([*base_objects(BASE)])
    assert set(first.values()) == {"created"}
    assert not any("/secrets/" in path for path in cluster.general.stored)  # KubeRay makes a token for each cluster
    again = install()
    assert again.keys() == first.keys() and set(again.values()) == {"unchanged"}
    planned = CliRunner().invoke(app, ["k8s", "install", "--cluster", "k8s", "--dry-run"]).stdout.splitlines()
    assert planned == [*first]


def test_it_says_what_it_changes_and_leaves_what_is_others(cluster: Cluster) -> None:
    install("--storage", "2Ti", "--storage-class", "nfs")
    role = stored(cluster, "/apis/rbac.authorization.k8s.io/v1/namespaces/research/roles/fleetune-client")
    role["rules"] = role["rules"][:1]
    role["metadata"]["labels"] = {"team": "a"}
    changed = install()
    assert changed.pop("Role research/fleetune-client") == "changed (rules)"
    assert set(changed.values()) == {"unchanged"}
    role = stored(cluster, "/apis/rbac.authorization.k8s.io/v1/namespaces/research/roles/fleetune-client")
    assert len(role["rules"]) > 1 and role["metadata"]["labels"] == {"team": "a"}
    volume = stored(cluster, CLAIM)["spec"]
    assert (volume["resources"]["requests"]["storage"], volume["storageClassName"]) == ("2Ti", "nfs")
    assert install("--storage", "3Ti")["PersistentVolumeClaim research/fleetune"] == (
        "changed (spec.resources.requests.storage)"
    )


NAMESPACE = "/api/v1/namespaces/research"
ENFORCE = "pod-security.kubernetes.io/enforce"


def test_what_others_have_made_is_left_unless_it_is_to_be_taken_over(cluster: Cluster) -> None:
    labels = {ENFORCE: "privileged", "owner": "others"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "research", "labels": labels}}
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "fleetune-run", "namespace": "research"},
    }
    account_path = f"{NAMESPACE}/serviceaccounts/fleetune-run"
    for path, manifest in ((NAMESPACE, namespace), (account_path, account)):
        assert cluster.answer("PATCH", path, {"fieldManager": "kubectl"}, manifest, "admin")[0] == 201
    done = install()
    left = {what: outcome for what, outcome in done.items() if outcome != "created"}
    assert left.keys() == {"Namespace research", "ServiceAccount research/fleetune-run"}
    assert left["Namespace research"].startswith("left (it is of others; --take-over would change metadata.labels.")
    assert left["ServiceAccount research/fleetune-run"].endswith(" change automountServiceAccountToken)")
    assert stored(cluster, NAMESPACE)["metadata"]["labels"] == labels
    assert "automountServiceAccountToken" not in stored(cluster, account_path)
    assert install("--take-over")["Namespace research"].startswith("changed (metadata.labels.")
    assert stored(cluster, NAMESPACE)["metadata"]["labels"][ENFORCE] == "restricted"
    assert set(install().values()) == {"unchanged"}


@pytest.mark.parametrize("account", ["fleetune-client", "fleetune-keeper"])
def test_the_account_of_runs_is_none_that_may_make_them(account: str) -> None:
    with pytest.raises(ValueError, match=f"found '{account}'"):
        KubernetesSettings.model_validate({"image": IMAGE, "service_account": account})


def test_two_namespaces_leave_each_other_alone(cluster: Cluster) -> None:
    install()
    before = {path: stored(cluster, path) for path in cluster.general.stored}
    CliRunner().invoke(app, ["k8s", "install", "--cluster", "second"], catch_exceptions=False)
    after = {path: stored(cluster, path) for path in before}
    assert after == before and len(cluster.general.stored) == 2 * len(before) - 1  # a role of the cluster is shared


def test_what_is_refused_is_said_and_the_rest_is_there() -> None:
    install("--storage-class", "nfs")
    with pytest.raises(InputError) as refused:
        install("--storage-class", "other")
    first, line = str(refused.value).splitlines()
    assert first == "the server refused 1 of 14; what else there is was applied:"
    assert line.startswith("PersistentVolumeClaim research/fleetune: refused (PersistentVolumeClaim ")
    assert "spec is immutable" in line


def test_who_may_not_is_told_each_right_that_lacks(cluster: Cluster) -> None:
    cluster.tokens["admin"] = {("get", "namespaces"), ("get", "roles")}
    with pytest.raises(InputError) as refused:
        install()
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 + len([*base_objects(BASE)])
    assert 'cannot patch resource "namespaces"' in lines[1]
    assert 'cannot get resource "deployments"' in lines[-1]
    assert cluster.general.stored == {}


def of_built_in_kinds() -> Iterator[dict[str, Any]]:
    """The objects of base and overlays, without those of Kueue, whose kinds are its own."""
    yield from base_objects(BASE)
    for overlay in OVERLAYS:
        for path in sorted(overlay.glob("*.yaml")):
            for manifest in yaml.safe_load_all(path.read_text()):
                if not manifest["apiVersion"].startswith(("kueue.", "kustomize.")):
                    yield manifest


def pod_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The pod that an object makes, if it makes one."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    pod: dict[str, Any] | None = spec.get("template", {}).get("spec")
    return pod


@pytest.mark.parametrize(
    "manifest", [*of_built_in_kinds()], ids=lambda each: f"{each['kind']}-{each['metadata']['name']}"
)
def test_manifests_pass_strict_validation_and_restricted_pod_security(manifest: dict[str, Any]) -> None:
    assert strict_problems(manifest) == []
    assert strict_problems({**manifest, "spce": {}}) != []
    pod = pod_of(manifest)
    if pod:
        assert broken_rules(pod) == set()
        pod["securityContext"].pop("runAsNonRoot")
        assert broken_rules(pod) == {"is_not_root"}


def test_what_makes_pods_is_among_them() -> None:
    assert {manifest["kind"] for manifest in of_built_in_kinds() if pod_of(manifest)} == {"CronJob", "Deployment"}
