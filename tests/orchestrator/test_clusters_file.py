"""The clusters file: what is wrong in it is said with path, what was found, and what is allowed."""

from pathlib import Path

import pytest

from orchestrator.clusters_file import default_cluster, read_clusters
from orchestrator.errors import InputError


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the clusters file is, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("FLEETUNE_CLUSTERS", raising=False)
    monkeypatch.delenv("FLEETUNE_CLUSTER", raising=False)
    (tmp_path / "fleetune").mkdir()
    return tmp_path / "fleetune" / "clusters.yaml"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hpc: {kind: slrum}", "hpc.kind: found 'slrum'; did you mean 'slurm'? allowed: local or slurm"),
        ("hpc: 3", "hpc.kind: found None; allowed: local or slurm"),
        ("hpc: {kind: slurm, partitoin: gpu}", "hpc.partitoin: unknown key; did you mean 'partition'? allowed: "),
        ("tower: {kind: local, partition: gpu}", "tower.partition: unknown key; allowed: link, root, python, setup"),
        ("hpc: {kind: slurm, cpus_per_worker: 0}", "hpc.cpus_per_worker: found 0; allowed: greater than"),
        (
            "tower: {kind: local, link: {ssh: '-oProxyCommand=x'}}",
            "tower.link: found {'ssh': '-oPr",
        ),
        ("hpc: {kind: slurm, partition: '$(id)'}", "hpc.partition: found '$(id)'; allowed: "),
        ("local: {kind: local}", "'local': allowed as a cluster's name"),
    ],
)
def test_what_is_wrong_is_one_line(clusters: Path, text: str, problem: str) -> None:
    assert read_clusters() == {}
    clusters.write_text(text)
    with pytest.raises(InputError) as refused:
        read_clusters()
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{clusters}: {problem}")


def test_the_default_is_of_the_environment_then_of_the_settings(
    clusters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_cluster() == "local"
    clusters.with_name("config.yaml").write_text("cluster: hpc")
    assert default_cluster() == "hpc"
    monkeypatch.setenv("FLEETUNE_CLUSTER", "tower")
    assert default_cluster() == "tower"
