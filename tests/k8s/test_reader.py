"""Run folders through a pod: the reader's commands are real processes here, behind a server that speaks WebSocket."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import Cluster, served, write_kubeconfig
from small_cluster import IMAGE, NEEDED, ROOT, reader

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters.base import Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from clusters.pod_link import PodLink
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"
ALLOWED = {(verb, resource) for (_, resource), verbs in NEEDED.items() for verb in verbs}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster whose volume is a folder, with two readers, one of which is ready."""
    cluster = Cluster(tokens={"client": set(ALLOWED)})
    for name, ready in (("reader-1", False), ("reader-2", True)):
        cluster.objects["pods", name] = reader(name, ready)
    (tmp_path / "volume").mkdir()
    cluster.environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "FLEETUNE_POD": "reader-2"}
    return cluster


@pytest.fixture(autouse=True)
def address(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", python_path)
    with served(cluster) as address:
        write_kubeconfig(tmp_path / "kubeconfig", address, "client")
        yield address


@pytest.fixture
def backend(tmp_path: Path) -> Kubernetes:
    plain = {"kind": "kubernetes", "image": IMAGE, "root": str(tmp_path / "volume"), "python": sys.executable}
    config = KubernetesConfig.model_validate(plain)
    return Kubernetes.open(config, Path(config.root))


def execute(*command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A command in the reader's pod."""
    return subprocess.run(PodLink(None, "fleetune").process(command), input=given, capture_output=True, timeout=60)


def test_streams_and_exit_code_come_through() -> None:
    data = random.Random(0).randbytes(3_000_000)
    echoed = execute("cat", given=data)
    assert (echoed.returncode, echoed.stdout, echoed.stderr) == (0, data, b"")
    failed = execute("sh", "-c", 'echo "$1"; echo wrong >&2; exit 97', "sh", "a 'b' $(c) ü\n")
    assert (failed.returncode, failed.stdout, failed.stderr) == (97, "a 'b' $(c) ü\n\n".encode(), b"wrong\n")


def test_what_breaks_the_connection_is_told_from_the_command(cluster: Cluster) -> None:
    cluster.tokens["client"] = ALLOWED - {("create", "pods/exec")}
    refused = execute("true")
    assert refused.returncode == 255 and b"403" in refused.stderr
    del cluster.objects["pods", "reader-2"]
    missing = execute("true")
    assert missing.returncode == 255 and b"no pod of the reader is ready" in missing.stderr


def test_a_run_lives_on_the_claim(backend: Kubernetes, cluster: Cluster, tmp_path: Path) -> None:
    record = {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()}
    assert backend.site.create(RUN_ID, record) is None
    assert backend.site.create(RUN_ID, record) is not None
    assert (tmp_path / "volume" / "runs" / RUN_ID / "job.yaml").exists()
    request = backend.request(JOB, RUN_ID)
    backend.submit(request)
    sessions = len(cluster.sessions)
    standing = backend.look([RUN_ID])[RUN_ID]
    assert (standing.folder.run_id, standing.on_cluster.state) == (RUN_ID, "queued")
    assert backend.look().keys() == {RUN_ID}
    assert len(cluster.sessions) == sessions  # the same process answers
    log = tmp_path / "volume" / "kubernetes" / f"{RUN_ID}-s1.log"
    log.parent.mkdir()
    log.write_text("the first line\n")
    assert backend.logs(RUN_ID).text == "the first line\n"
    assert backend.logs(RUN_ID, 4).text == "first line\n"
    run_dir = tmp_path / "volume" / "runs" / RUN_ID
    code = next(variable for variable in environment_of(request.text) if variable["name"] == "PYTHONPATH")
    assert (Path(code["value"]) / "clusters" / "pod_job.py").exists()
    assert run_dir.exists()


def environment_of(text: str) -> list[dict[str, str]]:
    """The variables of the head."""
    from k8s.text import manifest_in

    head = manifest_in(text)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    variables: list[dict[str, str]] = head["containers"][0]["env"]
    return variables


def test_a_run_that_waits_is_cancelled_and_closed(backend: Kubernetes, cluster: Cluster, tmp_path: Path) -> None:
    backend.site.create(RUN_ID, {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()})
    backend.submit(backend.request(JOB, RUN_ID))
    backend.site.ask(RUN_ID, "cancel")
    backend.cancel(RUN_ID)
    assert ("rayjobs", f"{RUN_ID}-s1") not in cluster.objects
    result = backend.site.snapshots([RUN_ID])[RUN_ID].result
    assert result and result["state"] == "cancelled"
    assert (tmp_path / "volume" / "runs" / RUN_ID / "result.json").exists()


def test_a_run_that_runs_is_left_to_its_controller(backend: Kubernetes, cluster: Cluster) -> None:
    backend.submit(backend.request(JOB, RUN_ID))
    cluster.objects["rayjobs", f"{RUN_ID}-s1"]["status"] = {"jobDeploymentStatus": "Running"}
    backend.cancel(RUN_ID)
    assert ("rayjobs", f"{RUN_ID}-s1") in cluster.objects
    assert not cluster.sessions


def test_a_connection_that_is_cut_is_unreachable_and_then_there_again(backend: Kubernetes, cluster: Cluster) -> None:
    assert backend.site.ids() == []
    cluster.sessions[-1].process.send_signal(signal.SIGKILL)
    with pytest.raises(Unreachable):
        backend.site.ids()
    assert backend.site.ids() == []
