"""A look at many runs: the requests that it takes are counted."""

import os
import shutil
import time
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from api_server import Cluster
from run_folders import make_run

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from clusters import kubernetes_api
from clusters.kubernetes import Kubernetes
from k8s.planned import RUN_LABEL
from orchestrator.backends import open_cluster
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUNS = [f"fake-{number:010}" for number in range(500)]


@pytest.fixture
def backend(laptop: Path, cluster: Cluster, tmp_path: Path) -> Kubernetes:
    """A cluster with 500 runs, which Fleetune's code has been sent to."""
    file = tmp_path / "clusters.yaml"
    clusters = yaml.safe_load(file.read_text())
    clusters["k8s"]["queue"] = "team-a"
    file.write_text(yaml.safe_dump(clusters))
    cluster.general.pending = []
    backend = open_cluster("k8s")
    assert isinstance(backend, Kubernetes)
    assert backend.site.ids() == []
    first = make_run(laptop / "runs", RUNS[0], None)
    backend.submit(backend.request(JOB, RUNS[0]))
    stored = cluster.objects.pop(("rayjobs", f"{RUNS[0]}-s1"))
    for number, run_id in enumerate(RUNS):
        if number:
            shutil.copytree(first, laptop / "runs" / run_id, copy_function=os.link)
        labels = stored["metadata"]["labels"] | {RUN_LABEL: run_id}
        metadata = stored["metadata"] | {"name": f"{run_id}-s1", "labels": labels}
        running = stored | {"metadata": metadata, "status": {"jobDeploymentStatus": "Running"}}
        cluster.objects["rayjobs", f"{run_id}-s1"] = running
    backend._reader.close()
    cluster.requests.clear()
    return backend


def asked(cluster: Cluster) -> Counter[str]:
    """What was asked for, and how often; the further pages of a list are the same question."""
    counted: Counter[str] = Counter()
    for request in cluster.requests:
        url = urlsplit(request.partition(" ")[2])
        if "continue" not in parse_qs(url.query):
            counted[url.path.rpartition("/")[2]] += 1
    return counted


@pytest.mark.usefixtures("backend")
def test_five_hundred_runs_are_one_list_and_one_command(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    found = fleetune.list_runs("k8s")
    assert len(found) == 500 and {run.state for run in found} == {"starting"}
    assert asked(cluster) == {"rayjobs": 1, "pods": 1, "exec": 1}  # a pod of the reader is looked for
    assert len(cluster.requests) == 3 + len(RUNS) // kubernetes_api._PAGE - 1
    cluster.requests.clear()
    began = time.monotonic()
    assert len(fleetune.list_runs("k8s")) == 500
    with capsys.disabled():
        print(f"\n500 runs, of a cluster's API server and a reader: {time.monotonic() - began:.2f} s")
    assert asked(cluster) == {"rayjobs": 1}  # the same command in the pod answers
    for run_id in RUNS[:200]:
        cluster.objects["rayjobs", f"{run_id}-s1"]["status"] = {"jobDeploymentStatus": "Suspended"}
    cluster.requests.clear()
    found = fleetune.list_runs("k8s")
    assert sum(run.state == "queued" for run in found) == 200
    assert asked(cluster) == {"rayjobs": 1, "pods": 1, "workloads": 1, "pendingworkloads": 1}
