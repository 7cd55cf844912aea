"""Commands of a laptop against a cluster of kind kubernetes, as the account that `fleetune k8s` makes may use it."""

import json
from pathlib import Path
from typing import Any

import pytest
from api_server import Cluster
from evaluations import make_adapter, succeed
from jobs import make_job
from laptop import configure

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from k8s.planned import RUN_LABEL
from k8s.text import manifest_in
from orchestrator import submit as submission
from orchestrator.backends import open_cluster
from orchestrator.cluster_doctor import cluster_checks
from orchestrator.cluster_setup import set_up_cluster
from orchestrator.errors import InputError, JobRefused
from orchestrator.submit import Submission

pytestmark = pytest.mark.usefixtures("laptop")


def test_a_job_is_submitted_looked_at_and_cancelled(
    laptop: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    job = make_job(tmp_path, resources={"nodes": 2, "gpus_per_node": 4})
    dry = manifest_in(submission.dry_run(job, cluster="k8s"))
    assert not cluster.created
    site: Any = open_cluster("k8s").site
    assert site.far_side._process is None, "of which nothing is asked, nothing is started"
    submitted = fleetune.submit(job, cluster="k8s")
    run_id = submitted.run_id
    assert cluster.created == [f"{run_id}-s1"]
    stored = cluster.objects["rayjobs", f"{run_id}-s1"]
    assert stored["metadata"]["labels"][RUN_LABEL] == run_id
    assert dry["spec"].keys() == stored["spec"].keys()
    run_dir = laptop / "runs" / run_id
    assert "hf_secret" in (run_dir / "secrets.json").read_text()
    assert "hf_secret" not in str(cluster.objects) + "".join(cluster.requests)
    status = fleetune.status(run_id)
    assert (status.state, status.cluster) == ("queued", "k8s")
    assert "KubeRay's operator has not taken it up" in (status.reason or "")
    stored["status"] = {"jobDeploymentStatus": "Running"}
    assert fleetune.status(run_id).state in ("starting", "running")
    stored["status"] = {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}
    fleetune.resume(run_id)
    assert cluster.created == [f"{run_id}-s1", f"{run_id}-s2"]
    fleetune.cancel(run_id)
    assert fleetune.status(run_id).state == "cancelled"
    assert ("rayjobs", f"{run_id}-s2") not in cluster.objects


def test_an_evaluation_is_a_rayjob_whose_answers_come_back(
    laptop: Path, cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "sums.yaml"
    task.write_text("kind: generation\ndata: sums.jsonl\nmax_new_tokens: 4\n")
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    entrypoints = []

    def work(submission: Submission) -> None:
        """What KubeRay and Ray would have its worker do."""
        found = cluster.objects["rayjobs", f"{submission.run_id}-s1"]
        entrypoints.append(found["spec"]["entrypoint"].split())
        succeed(laptop / "runs" / submission.run_id)

    report = fleetune.evaluate([adapter], [task], base=str(tiny_base), cluster="k8s", announce=work)
    (run_dir,) = (laptop / "runs").iterdir()
    ((*_, module, where, name, nodes),) = entrypoints
    assert (module, where, name, nodes) == ("clusters.pod_job", str(run_dir), f"{run_dir.name}-s1", "1")
    assert [result.label for result in report.tasks[0].results] == ["base", "adapter"]
    assert all(len(result.scores) == 3 for result in report.tasks[0].results)
    fleetune.evaluate([adapter], [task], base=str(tiny_base), cluster="k8s", announce=lambda _: None)
    assert cluster.created == [f"{run_dir.name}-s1"], "which has all the answers"


def test_a_job_that_the_server_does_not_take_is_closed(cluster: Cluster, tmp_path: Path) -> None:
    cluster.quota = 0
    with pytest.raises(InputError, match="Kubernetes does not take this job: .* exceeded quota"):
        fleetune.submit(make_job(tmp_path), cluster="k8s")
    assert cluster.created == []


def test_a_submission_that_is_there_as_something_else_is_refused_and_left(cluster: Cluster, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    run_id = fleetune.submit(job, cluster="k8s").run_id
    configure(tmp_path, cpus_per_worker=1)
    with pytest.raises(
        InputError, match=rf"^RayJob {run_id}-s1 is there already, .*: fleetune status {run_id}$"
    ) as told:
        fleetune.submit(job, cluster="k8s", run_id=run_id)
    assert not isinstance(told.value, JobRefused)  # by which another cluster would get it
    assert cluster.created == [f"{run_id}-s1"] and fleetune.status(run_id).state == "queued"


def test_the_doctor_starts_no_job_of_its_own() -> None:
    with pytest.raises(InputError, match="--test-job: found cluster 'k8s'"):
        cluster_checks("k8s", test_job=True)


def test_its_image_has_the_packages() -> None:
    with pytest.raises(InputError, match="its image has the packages"):
        set_up_cluster("k8s", yes=True)
