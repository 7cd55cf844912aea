"""Secrets are in the run folder alone, for its owner: in no manifest, request, event, log or answer of a command."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from api_server import Cluster
from jobs import make_job
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from k8s.text import manifest_in
from orchestrator.backends import open_cluster
from orchestrator.cli import app

SHELL = {
    "HF_TOKEN": "hf_ofTheShell0000",
    "MLFLOW_TRACKING_PASSWORD": "pw-of-the-shell",
    "AWS_SECRET_ACCESS_KEY": "aws/of/the/shell",
    "HTTPS_PROXY": "http://me:pw-of-the-proxy@proxy.example.org:3128",
}
OF_JOB = {"WANDB_API_KEY": "wandb-of-the-job", "ODD_TOKEN": "$(HF_TOKEN) 'of' \"the job\"\n"}
URI = "https://me:pw-of-the-uri@mlflow.example.org"
SECRETS = (*SHELL.values(), *OF_JOB.values(), URI)
PARTS = ("of-the-proxy", "of-the-uri", "ofTheShell", "of/the/shell", "of-the-shell", "of-the-job", "'of'")


@pytest.fixture
def job(laptop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job with secrets, in a shell with others, on a cluster that has some in Secrets."""
    assert laptop.exists()
    file = tmp_path / "clusters.yaml"
    clusters = yaml.safe_load(file.read_text())
    clusters["k8s"]["secrets"] = {"GH_TOKEN": "github/token"}
    file.write_text(yaml.safe_dump(clusters))
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    return make_job(tmp_path, env=OF_JOB | {"PLAIN": "seen"}, tracking={"uri": URI, "experiment": "e"})


def said(*command: str) -> str:
    """All that a command prints, whether it succeeds or not."""
    ran = CliRunner().invoke(app, [*command])
    return f"{ran.output}\n{ran.exception}"


def escaped(secret: str) -> Iterator[str]:
    """A secret as JSON, YAML and URLs may have it."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield secret.replace("$", "$$")


def check(where: str, text: str) -> None:
    """Nothing of a secret is in a text."""
    found = [part for part in PARTS if part in text]
    found += [secret for secret in SECRETS for form in escaped(secret) if form in text]
    assert not found, f"{where}: {found}"


def test_no_secret_is_anywhere_but_where_it_belongs(
    job: Path, cluster: Cluster, laptop: Path, tmp_path: Path
) -> None:
    check("dry run", said("submit", str(job), "--cluster", "k8s", "--dry-run"))
    submitted = said("submit", str(job), "--cluster", "k8s")
    (name,) = cluster.created
    run_id = name.removesuffix("-s1")
    assert run_id in submitted
    check("submit", submitted)
    kept = laptop / "runs" / run_id / "secrets.json"
    values = json.loads(kept.read_text())
    assert {*SHELL.values(), *OF_JOB.values(), URI} - {*values.values()} <= {SHELL["HTTPS_PROXY"]}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600

    stored = cluster.objects["rayjobs", name]
    stored["status"] = {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "exit code 1"}
    for command in (
        ("status", run_id),
        ("status", run_id, "--json"),
        ("list", "--cluster", "k8s", "--json"),
        ("logs", run_id),
        ("doctor", "--cluster", "k8s", "--json"),
        ("resume", run_id),
        ("cancel", run_id),
        ("clusters", "prune", "k8s", "--yes", "--json"),
        ("k8s", "manifests", "--cluster", "k8s"),
    ):
        check(" ".join(command), said(*command))
    assert len(cluster.created) == 2

    for sent in cluster.sent:
        check("request", sent.decode())
    check("addresses and command lines", "\n".join(cluster.requests))
    check("objects", json.dumps([*cluster.objects.values(), *cluster.general.stored.values()]))
    for path in [*laptop.rglob("*"), *(tmp_path / "home").rglob("*")]:
        if path.is_file() and path.name != "secrets.json":
            check(str(path), path.read_bytes().decode(errors="replace"))
    assert not kept.exists()  # the run has ended


def test_secrets_of_the_cluster_are_named_alone(job: Path) -> None:
    shown = said("submit", str(job), "--cluster", "k8s", "--dry-run")
    whole = manifest_in(shown[: shown.rindex("\nNone")])
    ray_cluster = whole["spec"]["rayClusterSpec"]
    for group in (ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        named = {variable["name"]: variable for variable in container["env"]}
        assert named["GH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "github", "key": "token"}}
        assert named["PLAIN"]["value"] == "seen"
        assert not named.keys() & (SHELL.keys() | OF_JOB.keys())
    assert whole["metadata"]["annotations"].keys() == {"fleetune/digest"}


def test_the_account_that_submits_sees_no_secret(laptop: Path, cluster: Cluster) -> None:
    assert laptop.exists()
    allowed = cluster.tokens["client"] or set()
    assert not any(resource == "secrets" for _, resource in allowed)
    assert open_cluster("k8s").capacity().total == 8
