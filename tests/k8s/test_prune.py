"""`fleetune clusters prune`: what killed clients and ended runs leave goes, and nothing that is live."""

import os
import time
from pathlib import Path

import pytest
from api_server import Cluster
from run_folders import make_run
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters.kubernetes import Kubernetes
from k8s.planned import RUN_LABEL
from k8s.text import manifest_in
from orchestrator.backends import open_cluster
from orchestrator.cli import app
from orchestrator.errors import InputError
from orchestrator.prune import leftovers, prune
from runfolder.chain import close, reopen
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUNS = {name: f"{name}-0123456789" for name in ("ended", "live", "failed", "waiting", "gone", "damaged", "orphan")}
OLD_S = 100_000


def submit(cluster: Cluster, name: str, submission: int, deployment: str) -> None:
    """A RayJob of a run, as KubeRay has left it."""
    backend = open_cluster("k8s")
    assert isinstance(backend, Kubernetes)
    request = backend.request(JOB, RUNS[name], submission)
    backend.api.create(manifest_in(request.text))
    cluster.objects["rayjobs", request.name]["status"] = {"jobDeploymentStatus": deployment}


@pytest.fixture
def volume(laptop: Path, cluster: Cluster) -> Path:
    """A volume with runs of all kinds, and what clients have left that were killed."""
    for name in ("ended", "live", "failed", "waiting", "damaged"):
        run_dir = make_run(laptop / "runs", RUNS[name], None)
        (run_dir / "secrets.json").write_text('{"HF_TOKEN": "hf_secret"}')
    for name in ("ended", "waiting"):
        close(laptop / "runs" / RUNS[name], {"state": "cancelled", "reason": ""})
    (laptop / "runs" / RUNS["damaged"] / "run.json").unlink()
    (laptop / "runs" / RUNS["damaged"] / "job.yaml").write_text("{")
    submit(cluster, "ended", 1, "Complete")
    submit(cluster, "ended", 2, "Running")  # its controller delivers
    submit(cluster, "live", 1, "Failed")
    submit(cluster, "live", 2, "Running")
    submit(cluster, "failed", 1, "Failed")
    submit(cluster, "waiting", 1, "Suspended")
    submit(cluster, "gone", 1, "Failed")
    submit(cluster, "damaged", 1, "Failed")
    submit(cluster, "damaged", 2, "Failed")
    stored = cluster.objects["rayjobs", f"{RUNS['ended']}-s1"]
    cluster.objects["rayjobs", "mine"] = stored | {"metadata": stored["metadata"] | {"name": "mine"}}
    labels = {
        "app.kubernetes.io/managed-by": "fleetune",
        RUN_LABEL: RUNS["orphan"],
        "ray.io/cluster": "orphan-x2v4t",
    }
    pod = {"metadata": {"name": "w", "labels": labels}, "spec": {"containers": []}, "status": {"phase": "Running"}}
    cluster.objects["pods", "w"] = pod
    for path in (f"files/.{'a' * 64}", "code/.new-Xy12Za/clusters/base.py", f"runs/.new-{'b' * 32}/job.yaml"):
        make_old(laptop, path)
    (laptop / "files" / f".{'c' * 64}").write_bytes(b"it arrives")
    return laptop


def make_old(home: Path, path: str) -> None:
    """A file below a folder that nobody has touched for more than a day."""
    file = home / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * 2_000_000)
    then = time.time() - OLD_S
    top = home.joinpath(*Path(path).parts[:2])
    for each in (top, *top.rglob("*")):
        os.utime(each, (then, then))


def command(*options: str) -> list[str]:
    ran = CliRunner().invoke(app, ["clusters", "prune", "k8s", *options], catch_exceptions=False)
    assert ran.exit_code == 0
    return ran.stdout.splitlines()


def rayjobs(cluster: Cluster) -> set[str]:
    return {name for kind, name in cluster.objects if kind == "rayjobs"}


def test_it_says_what_it_would_remove_and_removes_it(volume: Path, cluster: Cluster) -> None:
    before = rayjobs(cluster)
    files = {*volume.rglob("*")}
    shown = command()
    assert shown == [
        f"RayJob {RUNS['ended']}-s1: its run has ended",
        f"RayJob {RUNS['live']}-s1: its run goes on by a later one",
        f"RayJob {RUNS['waiting']}-s1: its run has ended, and it goes on",
        f"RayCluster orphan-x2v4t: run {RUNS['orphan']} has no RayJob any more; "
        "remove it with: kubectl -n fleetune delete raycluster orphan-x2v4t",
        f"{volume}/code/.new-Xy12Za: Fleetune's code that came in part, more than a day ago, 2.0 MB",
        f"{volume}/files/.{'a' * 64}: a file that a job brought along that came in part, more than a day ago, 2.0 MB",
        f"{volume}/runs/.new-{'b' * 32}: a run folder that came in part, more than a day ago, 2.0 MB",
        f"{volume}/runs/{RUNS['ended']}/secrets.json: secrets of a run that has ended",
        f"{volume}/runs/{RUNS['waiting']}/secrets.json: secrets of a run that has ended",
    ]
    assert rayjobs(cluster) == before and {*volume.rglob("*")} >= files
    assert not any(request.startswith("DELETE") for request in cluster.requests)

    done = command("--yes")
    assert [line.removeprefix("removed ") for line in done] == shown
    assert [line for line in done if not line.startswith("removed ")] == [shown[3]]
    gone = {f"{RUNS['ended']}-s1", f"{RUNS['live']}-s1", f"{RUNS['waiting']}-s1"}
    assert rayjobs(cluster) == before - gone
    assert [*volume.glob("files/.*")] == [volume / "files" / f".{'c' * 64}"]
    assert not [*volume.glob("code/.new-*"), *volume.glob("runs/.new-*")]
    kept = {path.parent.name for path in volume.glob("runs/*/secrets.json")}
    assert kept == {RUNS["live"], RUNS["failed"], RUNS["damaged"]}
    assert command() == [shown[3]]


def test_what_goes_on_again_meanwhile_is_left(volume: Path, cluster: Cluster) -> None:
    found = leftovers("k8s")
    reopen(volume / "runs" / RUNS["waiting"])
    removed = {leftover.what for leftover in prune("k8s", found)}
    assert f"RayJob {RUNS['waiting']}-s1" not in removed and f"RayJob {RUNS['ended']}-s1" in removed
    assert f"{RUNS['waiting']}-s1" in rayjobs(cluster)
    assert (volume / "runs" / RUNS["waiting"] / "secrets.json").exists()


def test_a_run_whose_rayjobs_are_gone_goes_on_behind_them(volume: Path) -> None:
    starts = volume / "runs" / RUNS["failed"] / "starts"
    starts.mkdir()
    (starts / "4.1").touch()
    backend = open_cluster("k8s")
    assert backend.request(JOB, RUNS["failed"], None).submission == 5
    assert backend.request(JOB, RUNS["live"], None).submission == 3


@pytest.mark.usefixtures("laptop")
def test_other_clusters_have_none() -> None:
    with pytest.raises(InputError, match="clusters prune: found 'local'; allowed: a cluster of kind kubernetes"):
        leftovers("local")
