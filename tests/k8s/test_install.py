"""What `fleetune k8s` makes: the manifests of the base, under other names too, and the image's recipe."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pod_security import broken_rules
from small_cluster import IMAGE, NEEDED
from test_rayjob import SHORT_JOB, manifest
from typer.testing import CliRunner

import k8s
from clusters import kubernetes_access as permissions
from k8s.install import BASE, base_objects, install_manifests
from k8s.keeper import keeper_manifests
from k8s.planned import READER_LABEL
from k8s.settings import KubernetesSettings
from orchestrator.cli import app
from orchestrator.errors import InputError

ROOM = Path(k8s.__file__).parent
OVERLAYS = sorted((BASE.parent / "overlays").iterdir())
HOME = "/fleetune"
CLUSTER_WIDE = ("ClusterQueue", "ClusterRole", "ClusterRoleBinding", "Namespace", "ResourceFlavor")


def settings(**changes: Any) -> KubernetesSettings:
    return KubernetesSettings.model_validate({"image": IMAGE, **changes})


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def test_the_base_has_the_names_that_a_cluster_has_by_default() -> None:
    base = list(base_objects(BASE))
    (reader,) = of_kind(base, "Deployment")
    reader["spec"]["template"]["spec"]["containers"][0]["image"] = IMAGE
    assert install_manifests(settings(), HOME) == base


def test_other_names_are_other_names_everywhere() -> None:
    changed = settings(namespace="research", volume="runs", service_account="trainer")
    objects = install_manifests(changed, HOME, "2Ti", "nfs")
    assert [each["metadata"]["name"] for each in of_kind(objects, "Namespace")] == ["research"]
    assert {each["metadata"].get("namespace") for each in objects if each["kind"] not in CLUSTER_WIDE} == {"research"}
    (volume,) = of_kind(objects, "PersistentVolumeClaim")
    assert volume["metadata"]["name"] == "runs"
    assert volume["spec"]["storageClassName"] == "nfs"
    assert volume["spec"]["resources"]["requests"]["storage"] == "2Ti"
    accounts = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    assert accounts == {"trainer", "fleetune-client"}
    (binding,), (to_nodes,) = of_kind(objects, "RoleBinding"), of_kind(objects, "ClusterRoleBinding")
    assert (
        binding["subjects"]
        == to_nodes["subjects"]
        == [{"kind": "ServiceAccount", "name": "fleetune-client", "namespace": "research"}]
    )


def test_the_reader_is_like_the_pods_of_runs() -> None:
    changed = settings(
        volume="runs",
        service_account="trainer",
        user=1234,
        image_pull_secrets=["ghcr"],
        head_pod={"tolerations": ["cpu"]},
    )
    (reader,) = of_kind(install_manifests(changed, "/data"), "Deployment")
    pod = reader["spec"]["template"]["spec"]
    assert broken_rules(pod) == set()
    head = manifest(SHORT_JOB, **changed.model_dump(exclude={"image"}), root="/data")
    of_head = head["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for name in ("serviceAccountName", "securityContext", "imagePullSecrets", "tolerations"):
        assert pod[name] == of_head[name]
    assert pod["volumes"][0] == of_head["volumes"][0]
    assert pod["containers"][0]["volumeMounts"][:2] == of_head["containers"][0]["volumeMounts"][:2]
    assert reader["spec"]["selector"]["matchLabels"] == {READER_LABEL: "true"}
    assert reader["spec"]["template"]["metadata"]["labels"][READER_LABEL] == "true"


def test_what_is_no_run_has_a_queue_of_its_own_where_one_is_named() -> None:
    changed = settings(queue="gpus", reader_queue="small")
    objects = [*install_manifests(changed, HOME), *keeper_manifests(changed, HOME, "/code", ["python"])]
    (reader,) = of_kind(objects, "Deployment")
    (keeper,) = of_kind(objects, "CronJob")
    for part in (reader, keeper["spec"]["jobTemplate"]):
        assert part["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "small"}
        assert broken_rules(part["spec"]["template"]["spec"]) == set()
    (unnamed,) = of_kind(install_manifests(settings(queue="gpus"), HOME), "Deployment")
    assert "labels" not in unnamed["metadata"]


def test_pods_on_the_network_of_their_nodes_are_let_in() -> None:
    (restricted,) = of_kind(install_manifests(settings(), HOME), "Namespace")
    (privileged,) = of_kind(install_manifests(settings(host_network=True), HOME), "Namespace")
    key = "pod-security.kubernetes.io/enforce"
    assert restricted["metadata"]["labels"][key] == "restricted"
    assert privileged["metadata"]["labels"][key] == "privileged"


@pytest.mark.parametrize(("storage", "storage_class"), [("5 Gi", None), ("0Gi", None), (None, "a_b")])
def test_a_size_that_is_none_is_refused(storage: str | None, storage_class: str | None) -> None:
    with pytest.raises(ValueError, match="found '.*'; allowed: "):
        install_manifests(settings(), HOME, storage, storage_class)


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_a_kustomization_names_what_is_there(folder: Path) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    names = kustomization["resources"]
    assert files == {name for name in names if name.endswith(".yaml")}
    assert all((folder / name).exists() for name in names)
    for name in files:
        for each in yaml.safe_load_all((folder / name).read_text()):
            assert {"apiVersion", "kind", "metadata"} <= each.keys()
            in_namespace = each["metadata"].get("namespace")
            assert in_namespace == (None if each["kind"] in CLUSTER_WIDE else kustomization["namespace"])


def test_clients_may_do_what_they_need_and_pods_nothing() -> None:
    objects = install_manifests(settings(), HOME)
    (role,), (of_nodes,) = of_kind(objects, "Role"), of_kind(objects, "ClusterRole")
    allowed: dict[tuple[str, str], set[str]] = {}
    for rule in (*role["rules"], *of_nodes["rules"]):
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                allowed[group, resource] = set(rule["verbs"])
    assert allowed == NEEDED
    by_group: dict[tuple[str, str], set[str]] = {}
    for permission in (*permissions.NEEDED, *permissions.NEEDED_WITH_QUEUE, *permissions.WISHED):
        by_group.setdefault((permission.group, permission.resource), set()).add(permission.verb)
    assert by_group == NEEDED
    (binding,) = of_kind(objects, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(objects, "ServiceAccount"))


def test_network_policies_are_about_the_pods_of_runs() -> None:
    head = manifest(SHORT_JOB)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    labels = head | {"ray.io/node-type": "head"}  # which KubeRay sets
    policies = of_kind(install_manifests(settings(), HOME), "NetworkPolicy")
    for policy in policies:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    (deny,) = [policy for policy in policies if not policy["spec"].keys() & {"ingress", "egress"}]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert deny["spec"]["podSelector"]["matchLabels"].items() <= head.items()
    ports = {
        port["port"]
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
    }
    assert ports == {8265}


def write_clusters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = {"k8s": {"kind": "kubernetes", "image": IMAGE, "namespace": "research"}, "hpc": {"kind": "slurm"}}
    (folder / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(folder / "clusters.yaml"))


def test_the_command_prints_what_kubectl_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clusters(tmp_path, monkeypatch)
    shown = CliRunner().invoke(app, ["k8s", "manifests", "--cluster", "k8s", "--storage", "1Ti"])
    assert shown.exit_code == 0
    objects = list(yaml.safe_load_all(shown.stdout))
    assert objects == install_manifests(settings(namespace="research"), HOME, "1Ti")
    planned = CliRunner().invoke(app, ["k8s", "install", "--cluster", "k8s", "--dry-run"]).stdout.splitlines()
    assert planned[0] == "Namespace research"
    assert planned[-1] == "Deployment research/fleetune-reader"
    assert len(planned) == len(objects)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["manifests", "--cluster", "hpc"], "--cluster: found 'hpc', of kind slurm; allowed: one of kind kubernetes"),
        (["manifests", "--cluster", "kate"], "--cluster: found 'kate'; "),
        (["install", "--cluster", "k8s", "--storage", "big"], "--storage: found 'big'; allowed: a size"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clusters(tmp_path, monkeypatch)
    ended = CliRunner().invoke(app, ["k8s", *arguments])
    assert isinstance(ended.exception, InputError)
    assert str(ended.exception).startswith(error)


def instructions() -> list[tuple[str, str]]:
    """The instructions of the image's recipe, each with its arguments in one line."""
    text = (ROOM / "image" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def test_the_image_runs_as_the_pods_do_and_has_what_they_need() -> None:
    recipe = instructions()
    first, second = (number for number, (word, _) in enumerate(recipe) if word == "FROM")
    bases = [arguments.split()[0] for word, arguments in recipe if word == "FROM"]
    assert all(re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", base) for base in bases)
    final = recipe[second:]
    assert [arguments for word, arguments in final if word == "USER"] == [f"{settings().user}:{settings().user}"]
    commands = [arguments for word, arguments in recipe if word == "RUN"]
    assert any("pip install -c constraints.txt" in command for command in commands)
    assert not any(word in ("ADD", "ENTRYPOINT") for word, _ in recipe)
    (packages,) = [command for command in commands if "apt-get install" in command]
    assert "--no-install-recommends" in packages and "rm -rf /var/lib/apt/lists/*" in packages
    assert "wget" in shlex.split(packages)  # by which KubeRay asks how Ray is
    (line,) = re.findall(r'echo "([^"]*)" > /etc/profile\.d/\w+\.sh', packages)  # for login shells
    (variables,) = [arguments for word, arguments in final if word == "ENV"]
    assert line.removeprefix("export ").replace("\\$", "$") in variables.split()
    assert not any(word == "COPY" and "--from" not in arguments for word, arguments in recipe[second:])
    assert first == 0


def test_the_image_gets_all_that_is_installed_and_nothing_else() -> None:
    root = ROOM.parent
    pyproject = (root / "pyproject.toml").read_text()
    (packages,) = re.findall(r"^include = \[(.*)\]", pyproject, re.MULTILINE)
    (modules,) = re.findall(r"^py-modules = \[(.*)\]", pyproject, re.MULTILINE)
    copied: set[str] = set()
    for word, arguments in instructions():
        if word == "COPY" and not arguments.startswith("--from"):
            *sources, _ = arguments.split()
            copied.update(sources)
    assert {name.strip(' "*') for name in packages.split(",")} <= copied
    assert {name.strip(' "') + ".py" for name in modules.split(",")} <= copied
    assert all((root / name).exists() for name in copied)
    let_in = (ROOM / "image" / "Dockerfile.dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in let_in if line.startswith("!")} == copied
