"""The chapter "On Kubernetes" of the README, typed as it stands against the server of the tests."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from api_server import Cluster
from jobs import make_job
from small_cluster import ROOT, bind_volume, reader
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from orchestrator.cli import app
from runfolder.chain import close


def chapter() -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition("\n## On Kubernetes\n")[2].partition("\n## ")[0]


def clusters_file() -> dict[str, dict[str, str]]:
    """The clusters file of the chapter, with a digest in the place of its dots."""
    (block,) = re.findall(r"```yaml\n(.*?)```", chapter(), re.DOTALL)
    clusters: dict[str, dict[str, str]] = yaml.safe_load(block.replace("sha256:...", f"sha256:{'0' * 64}"))
    return clusters


def commands() -> Iterator[list[str]]:
    """The commands of the chapter, without those of pip."""
    for line in chapter().splitlines():
        if line.startswith("    fleetune "):
            yield shlex.split(line, comments=True)[1:]


def typed(arguments: list[str]) -> str:
    """What a command prints, which succeeds."""
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0, (arguments, ran.output)
    return ran.output


def test_what_the_readme_says_works_as_written(
    laptop: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusters.kubernetes_namespace._SERVER", "localhost")  # a name that is resolved here
    clusters = clusters_file()
    image = clusters["k8s"]["image"]
    clusters["k8s"] |= {"root": str(laptop), "python": sys.executable}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    make_job(tmp_path, name="first", resources={"nodes": 2, "gpus_per_node": 4})
    monkeypatch.chdir(tmp_path)
    cluster.general.stored.clear()
    cluster.general.owned.clear()
    cluster.general.pending = []
    del cluster.objects["pods", "reader-1"]
    cluster.tokens["client"] = None  # who may make namespaces
    said: dict[str, str] = {}
    for command in commands():
        said[command[0]] = typed(command)
        if command[0] == "k8s":
            bind_volume(cluster)
            cluster.objects["pods", "reader-1"] = reader("reader-1", True)
        if command[0] == "submit":
            (name,) = cluster.created
            cluster.objects["rayjobs", name]["status"] = {"jobDeploymentStatus": "Suspended"}
        if command[0] == "status":
            run_dir = laptop / "runs" / name.removesuffix("-s1")
            (run_dir / "output").mkdir()
            (run_dir / "output" / "adapter_model.safetensors").write_bytes(b"weights")
            close(run_dir, {"state": "succeeded", "reason": ""})
            cluster.objects["rayjobs", name]["status"] = {"jobDeploymentStatus": "Complete"}
    assert [*said] == ["k8s", "doctor", "submit", "status", "logs", "fetch", "clusters"]
    assert image.startswith("registry.example.org/")
    assert said["k8s"].count(": created") == 14
    assert "fail" not in said["doctor"] and "warn" not in said["doctor"]
    assert "Kueue: it waits for queue team-a to admit it" in " ".join(said["status"].split())
    assert (tmp_path / "first" / "output" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert f"RayJob {name}: its run has ended" in said["clusters"]
