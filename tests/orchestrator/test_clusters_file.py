"""The clusters file: what is wrong in it is said with path, what was found, and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from clusters.slurm_script import SlurmConfig
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
        (
            "hpc: {kind: slrum}",
            "hpc.kind: found 'slrum'; did you mean 'slurm'? allowed: local or slurm or kubernetes",
        ),
        ("hpc: 3", "hpc.kind: found None; allowed: local or slurm or kubernetes"),
        ("hpc: {kind: slurm, partitoin: gpu}", "hpc.partitoin: unknown key; did you mean 'partition'? allowed: "),
        (
            "tower: {kind: local, partition: gpu}",
            "tower.partition: unknown key; allowed: kind, link, root, python, setup",
        ),
        ("hpc: {kind: slurm, cpus_per_worker: 0}", "hpc.cpus_per_worker: found 0; allowed: greater than"),
        (
            "tower: {kind: local, link: {ssh: '-oProxyCommand=x'}}",
            "tower.link: found {'ssh': '-oPr",
        ),
        ("hpc: {kind: slurm, partition: '$(id)'}", "hpc.partition: found '$(id)'; allowed: "),
        ("hpc: {kind: [slurm]}", "hpc.kind: found ['slurm']; allowed: local or slurm or kubernetes"),
        ('hpc: {kind: slurm, setup: ["a\\ud800"]}', "hpc.setup: must be Unicode text, without halves of"),
        ("hpc: {kind: slurm, root: $SCRATCH/x}", "hpc.root: found '$SCRATCH/x'; must be written out, without $"),
        ("hpc: {kind: slurm, root: runs}", "hpc.root: found 'runs'; must be an absolute path, or one that begins"),
        ("hpc: {kind: slurm, python: $HOME/python}", "hpc.python: found '$HOME/python'; must be written out"),
        (
            "hpc: {kind: slurm, container: ft.sif}",
            "hpc.container.image: found 'ft.sif'; must be an absolute path",
        ),
        ("hpc: {kind: slurm, container: {}}", "hpc.container.image: missing"),
        ("hpc: {kind: slurm, container: 3}", "hpc.container: found 3; allowed: a mapping"),
        ("hpc: {kind: slurm, container: {image: /a, mount: [/b]}}", "hpc.container.mount: unknown key; did you mean"),
        (
            "hpc: {kind: slurm, container: {image: /a, runtime: docker}}",
            "hpc.container.runtime: found 'docker'; allowed: 'apptainer' or 'singularity'",
        ),
        (
            "hpc: {kind: slurm, container: {image: /a, mounts: [/b, '/c,/d']}}",
            "hpc.container.mounts.1: found '/c,/d'; must be like /data",
        ),
        (
            "hpc: {kind: slurm, container: {image: /a, python: -c}}",
            "hpc.container.python: found '-c'; must be a command",
        ),
        ("tower: {kind: local, container: /a}", "tower.container: unknown key; allowed: kind"),
        ("hpc: {kind: slurm, walltime: soon}", "hpc.walltime: found 'soon'; allowed: seconds, or like 90s, 30m, 8h"),
        ("tower: {kind: local, link: {ssh: 'me@login:2222'}}", "tower.link: found {'ssh': 'me"),
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


@pytest.mark.parametrize(
    ("written", "option"),
    [("8h", "480"), ("90s", "2"), ("3600", "60"), ("'1-12:00:00'", "1-12:00:00"), ("UNLIMITED", "UNLIMITED")],
)
def test_a_walltime_is_written_as_in_a_job_or_as_for_sbatch(clusters: Path, written: str, option: str) -> None:
    clusters.write_text(f"hpc: {{kind: slurm, walltime: {written}}}")
    config = read_clusters()["hpc"]
    assert isinstance(config, SlurmConfig) and config.walltime == option


def test_what_a_person_would_write_is_taken(clusters: Path) -> None:
    clusters.write_text("hpc: {kind: slurm, account: 123, setup: module load cuda}")
    config = read_clusters()["hpc"]
    assert isinstance(config, SlurmConfig)
    assert (config.account, config.setup) == ("123", ("module load cuda",))
    clusters.write_text("hpc: {kind: slurm, cpus: 1}")
    with pytest.raises(InputError, match=r"hpc\.cpus: unknown key"):
        read_clusters()


IMAGE = f"registry.example.org:5000/team/fleetune@sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image": "fleetune:latest"}, "image: found 'fleetune:latest'; must end with @sha256: and the 64 digits"),
        ({"image": "a@sha256:..."}, "image: found 'a@sha256:...'; must end with @sha256: and the 64 digits"),
        ({"image": "fleetune latest"}, "image: found 'fleetune latest'; must be an image"),
        ({"quue": "a"}, "quue: unknown key; did you mean 'queue'?"),
        ({"link": {"ssh": "there"}}, "link: found {'ssh': 'there'}; allowed: 'local'"),
        ({"setup": ["module load cuda"]}, "setup: no shell comes before Python in a pod"),
        ({"root": "runs"}, "root: found 'runs'; must be an absolute path"),
        ({"root": "/a/../etc"}, "root: found '/a/../etc'; must be an absolute path"),
        ({"root": "/usr"}, "root: found '/usr'; would hide what the image has there"),
        ({"root": "/dev/runs"}, "root: found '/dev/runs'; would hide what the image has there"),
        ({"namespace": "A.b"}, "namespace: found 'A.b'; must be a name of at most 63"),
        ({"volume": "a_b"}, "volume: found 'a_b'; must be a name of Kubernetes"),
        ({"user": 0}, "user: found 0; allowed: greater than or equal to 1"),
        ({"node_selector": {"a b": "c"}}, "node_selector: found 'a b'; allowed: a label"),
        ({"node_selector": {"gpu": ["h100", "-"]}}, "node_selector: found '-'; allowed: a label's value"),
        ({"tolerations": ["gpu:Never"]}, "tolerations.0: found 'gpu:Never'; a taint must be like"),
        ({"head_pod": {"tolerations": ["="]}}, "head_pod.tolerations.0: found '='; a taint must be like"),
        ({"gpu_resource": "gpu"}, "gpu_resource: found 'gpu'; must be a resource of a device plugin"),
        ({"gpu_resource": "node.kubernetes.io/gpu"}, "gpu_resource: found 'node.kubernetes.io/gpu'; must be"),
        ({"secrets": {"HF_TOKEN": "hf"}}, "secrets: found 'hf'; allowed: like hf/token"),
        ({"secrets": {"A B": "hf/token"}}, "secrets: 'A B' is no name of a variable"),
        ({"secrets": {"RAY_ADDRESS": "a/b"}}, "secrets: 'RAY_ADDRESS' is set in every pod by KubeRay"),
        ({"secrets": {"A": "a/b"}, "env": {"A": "b"}}, "secrets: A is in env, too"),
        ({"env": {"FLEETUNE_POD": "a"}}, "env: 'FLEETUNE_POD' is set in every pod by KubeRay"),
        ({"env": {"HF_TOKEN": "a"}}, "env: HF_TOKEN is a secret"),
        ({"setup": ["true", "export A=b HF_TOKEN=a"]}, "setup: HF_TOKEN is a secret"),
        ({"setup": ["HTTPS_PROXY='http://me:pw@proxy' curl x"]}, "setup: HTTPS_PROXY is a secret"),
        ({"memory_per_worker": 4}, "shared_memory: found 4; allowed: less than memory_per_worker, 4"),
        ({"shared_memory": 8}, "head_pod: memory: found 8; allowed: more than shared_memory, 8"),
        ({"queue_priority": "high"}, "queue_priority: found 'high'; Kueue's priorities are for what has a queue"),
        ({"queue": "a", "gang_scheduling": True}, "gang_scheduling: found beside queue"),
    ],
)
def test_what_kubernetes_would_not_take_is_one_line(clusters: Path, changes: dict[str, Any], problem: str) -> None:
    plain = {"kind": "kubernetes", "image": IMAGE, "queue": "team-a", "node_selector": {"gpu": ["h100", "h200"]}}
    clusters.write_text(yaml.safe_dump({"k8s": plain}))
    assert read_clusters()["k8s"].kind == "kubernetes"
    if "queue_priority" in changes:
        del plain["queue"]
    clusters.write_text(yaml.safe_dump({"k8s": plain | changes}))
    with pytest.raises(InputError) as refused:
        read_clusters()
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{clusters}: k8s.{problem}")


def test_the_default_is_of_the_environment_then_of_the_settings(
    clusters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_cluster() == "local"
    clusters.with_name("config.yaml").write_text("cluster: hpc")
    assert default_cluster() == "hpc"
    monkeypatch.setenv("FLEETUNE_CLUSTER", "tower")
    assert default_cluster() == "tower"
