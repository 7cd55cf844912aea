"""Open runs whose RayJobs have ended or are gone: whoever looks makes the next submission, once.

They are looked at from a pod that has the volume, as its CronJob does; one is from a laptop.
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Cluster, write_kubeconfig
from jobs import make_job
from kubelet import environment_of, image_environment
from pod_security import broken_rules
from small_cluster import IMAGE

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from clusters import kubernetes_keeper, pod_keeper
from clusters.base import ClusterStatus, Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_api import KubernetesApi
from clusters.kubernetes_config import KubernetesConfig
from clusters.pod_starts import HINDERED_STARTS
from k8s.planned import SUBMISSION_LABEL
from orchestrator.backends import open_cluster
from orchestrator.k8s_install import keeper_for, kubernetes_config
from runfolder import chain
from runfolder.hindrance import note_hindrance
from runfolder.job import Job
from runfolder.service import ServiceSpec
from runfolder.site import LocalSite

SERVICE = ServiceSpec(base="/fleetune/bases/b", tenants="/fleetune/tenants.yaml")
JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"


@pytest.fixture
def backend(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    """The cluster, seen from a pod, with a run whose RayJob is there."""
    monkeypatch.setenv("FLEETUNE_POD", "keeper-1")
    plain = {"kind": "kubernetes", "image": IMAGE, "root": str(laptop), "python": sys.executable}
    backend = Kubernetes.open(KubernetesConfig.model_validate(plain), laptop)
    backend.site.create(RUN_ID, {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()})
    backend.submit(backend.request(JOB, RUN_ID))
    return backend


def end(cluster: Cluster, number: int, deployment: str = "Failed") -> None:
    rayjob = cluster.objects["rayjobs", f"{RUN_ID}-s{number}"]
    rayjob["status"] = {"jobDeploymentStatus": deployment, "reason": "AppFailed"}


def look(backend: Kubernetes) -> ClusterStatus:
    return backend.look([RUN_ID])[RUN_ID].on_cluster


def numbers(cluster: Cluster) -> list[str]:
    """The submissions that were ever made."""
    return [name.removeprefix(f"{RUN_ID}-") for name in cluster.created]


def test_an_open_run_whose_rayjob_has_ended_is_submitted_again_once(backend: Kubernetes, cluster: Cluster) -> None:
    for deployment in ("", "Initializing", "Running", "Retrying", "Suspended"):
        end(cluster, 1, deployment)
        assert "submitted again" not in look(backend).reason
    assert numbers(cluster) == ["s1"]
    end(cluster, 1)
    status = look(backend)
    assert status.state == "queued"
    assert status.reason == f"its RayJob has ended, and it was submitted again: RayJob {RUN_ID}-s2"
    for _ in range(2):
        assert look(backend).state == "queued"
    assert numbers(cluster) == ["s1", "s2"]
    first, second = (cluster.objects["rayjobs", name] for name in cluster.created)
    as_second = json.loads(json.dumps(first["spec"]).replace(f"{RUN_ID}-s1", f"{RUN_ID}-s2"))
    for group in (as_second["rayClusterSpec"]["headGroupSpec"], *as_second["rayClusterSpec"]["workerGroupSpecs"]):
        group["template"]["metadata"]["labels"][SUBMISSION_LABEL] = "2"
    assert second["spec"] == as_second


def test_of_two_who_look_one_submits_again(backend: Kubernetes, cluster: Cluster) -> None:
    end(cluster, 1)
    newest = {RUN_ID: cluster.objects["rayjobs", f"{RUN_ID}-s1"]}
    for _ in range(2):
        assert kubernetes_keeper.submit_again(backend, newest)[RUN_ID].state == "queued"
    assert numbers(cluster) == ["s1", "s2"]


def test_what_took_no_attempt_further_is_left_to_people(backend: Kubernetes, cluster: Cluster, laptop: Path) -> None:
    for number in (1, 2, 3):
        end(cluster, number)
        state = look(backend).state
    assert state == "unknown" and numbers(cluster) == ["s1", "s2", "s3"]
    chain.claim_next(laptop / "runs" / RUN_ID, None)
    assert look(backend).state == "queued" and numbers(cluster)[-1] == "s4"


@pytest.mark.parametrize("why", ["result", "hindered", "invalid", "other version"])
def test_a_run_that_should_not_go_on_does_not(why: str, backend: Kubernetes, cluster: Cluster, laptop: Path) -> None:
    run_dir = laptop / "runs" / RUN_ID
    end(cluster, 1, "ValidationFailed" if why == "invalid" else "Failed")
    if why == "result":
        chain.close(run_dir, {"state": "failed", "reason": None})
    elif why == "hindered":
        for _ in range(HINDERED_STARTS):
            note_hindrance(run_dir, 1, "ImportError", gives_up=True)
    elif why == "other version":
        cluster.objects["rayjobs", f"{RUN_ID}-s1"]["metadata"]["annotations"] = {"fleetune/digest": "0" * 64}
    status = backend.status([RUN_ID])[RUN_ID]
    assert status.state == "unknown" and "fleetune resume submits it again" in status.reason
    assert numbers(cluster) == ["s1"]


def test_a_run_whose_rayjobs_were_deleted_goes_on_behind_its_last_start(
    backend: Kubernetes, cluster: Cluster
) -> None:
    starts = backend.home / "runs" / RUN_ID / "starts"
    starts.mkdir()
    (starts / "2.1").touch()
    cluster.objects.clear()
    assert "was submitted again" in look(backend).reason
    assert numbers(cluster) == ["s1", "s3"]


def test_a_run_without_a_rayjob_is_lost_after_a_while(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.objects.clear()
    monkeypatch.setattr(kubernetes_keeper, "_LOST_S", 1e12)
    assert look(backend).state == "unknown"
    monkeypatch.setattr(kubernetes_keeper, "_LOST_S", 600.0)
    for _ in range(2):
        assert look(backend).state == "queued"
        assert numbers(cluster) == ["s1", "s1"]


@pytest.mark.parametrize("rayjob", ["failed", "gone"])
def test_a_run_that_is_to_end_is_closed_where_no_controller_is_left(
    rayjob: str, backend: Kubernetes, cluster: Cluster, laptop: Path
) -> None:
    backend.site.ask(RUN_ID, "cancel")
    end(cluster, 1, "Running")
    look(backend)
    assert chain.result(laptop / "runs" / RUN_ID) is None  # its controller does it
    end(cluster, 1)
    if rayjob == "gone":
        cluster.objects.clear()
    standing = backend.look([RUN_ID])[RUN_ID]
    assert standing.folder.result and standing.folder.result["state"] == "cancelled"
    assert numbers(cluster) == ["s1"]


def test_a_submission_that_was_broken_off_is_not_made_by_who_looks(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "b-0123456789"
    backend.site.create(other, {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()})
    status = backend.look([other])[other].on_cluster
    assert status.state == "unknown" and "nobody has tried to submit it" in status.reason

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KubernetesApi, "create", interrupted)
        backend.submit(backend.request(JOB, other))
    assert backend.look([other])[other].on_cluster.state == "queued"  # whether it was made, nobody knew
    assert cluster.created == [f"{RUN_ID}-s1", f"{other}-s1"]


def test_a_client_whose_clock_is_behind_may_be_overtaken_and_there_is_one_job(
    backend: Kubernetes, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that clock the run is old, and who looks takes it for lost while its client is about to submit it."""
    other = "b-0123456789"
    backend.site.create(other, {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()})
    create = KubernetesApi.create

    def overtaken(api: KubernetesApi, manifest: dict[str, object]) -> None:
        monkeypatch.setattr(KubernetesApi, "create", create)
        assert "was submitted again" in backend.look([other])[other].on_cluster.reason
        create(api, manifest)

    monkeypatch.setattr(KubernetesApi, "create", overtaken)
    backend.submit(backend.request(JOB, other))
    assert cluster.created == [f"{RUN_ID}-s1", f"{other}-s1"]


def test_rayjobs_that_are_gone_again_and_again_are_left_to_people(backend: Kubernetes, cluster: Cluster) -> None:
    for _ in range(5):
        cluster.objects.clear()
        status = look(backend)
    assert status.state == "unknown" and numbers(cluster) == ["s1", "s1", "s1"]
    chain.claim_next(backend.home / "runs" / RUN_ID, None)
    assert look(backend).state == "queued"


def test_what_is_gone_is_not_submitted_by_another_image(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.objects.clear()
    image = f"registry.example.org/another@sha256:{'1' * 64}"
    other = Kubernetes.open(backend.config.model_copy(update={"image": image}), backend.home)
    status = look(other)
    assert status.state == "unknown" and "another version of Fleetune or of the clusters file" in status.reason
    assert numbers(cluster) == ["s1"]
    assert look(backend).state == "queued"


def test_a_submission_that_fails_is_said(backend: Kubernetes, cluster: Cluster) -> None:
    end(cluster, 1)
    cluster.quota = 1
    status = look(backend)
    assert status.state == "unknown"
    assert f"{RUN_ID}-s2 was not submitted: Kubernetes does not take this job" in status.reason


@pytest.mark.usefixtures("laptop")
def test_a_laptop_that_looks_does_so(cluster: Cluster, tmp_path: Path) -> None:
    run_id = fleetune.submit(make_job(tmp_path), cluster="k8s").run_id
    cluster.objects["rayjobs", f"{run_id}-s1"]["status"] = {"jobDeploymentStatus": "Failed"}
    assert [run.state for run in fleetune.list_runs()] == ["queued"]
    assert cluster.created == [f"{run_id}-s1", f"{run_id}-s2"]


@pytest.mark.usefixtures("laptop")
def test_its_cronjob_does_so_with_all_laptops_closed(cluster: Cluster, tmp_path: Path) -> None:
    run_id = fleetune.submit(make_job(tmp_path), cluster="k8s").run_id
    cluster.objects["rayjobs", f"{run_id}-s1"]["status"] = {"jobDeploymentStatus": "Failed"}
    objects = {each["kind"]: each for each in keeper_for("k8s")}
    cluster.tokens = {"keeper": rights_in(objects["Role"])}
    template = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]
    assert broken_rules(template["spec"]) == set()
    pod = template | {"metadata": {"name": "keeper-1"}}
    variables = environment_of(pod, image_environment(tmp_path))
    kubeconfig = yaml.safe_load(objects["ConfigMap"]["data"]["kubeconfig"])
    (as_account,) = kubeconfig["users"]
    assert as_account["user"] == {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}
    address = yaml.safe_load((tmp_path / "kubeconfig").read_text())["clusters"][0]["cluster"]["server"]
    write_kubeconfig(tmp_path / "kubeconfig", address, "keeper")
    (container,) = template["spec"]["containers"]
    printed = []
    for _ in range(2):
        ran = subprocess.run(
            container["command"],
            env=variables | {"KUBECONFIG": str(tmp_path / "kubeconfig")},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    assert printed == [f"{run_id}: its RayJob has ended, and it was submitted again: RayJob {run_id}-s2\n", ""]
    assert cluster.created == [f"{run_id}-s1", f"{run_id}-s2"]


def test_its_cronjob_removes_rayjobs_that_are_over_for_long(
    laptop: Path,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_ids = [fleetune.submit(make_job(tmp_path, name=name), cluster="k8s").run_id for name in ("a", "b", "c", "d")]
    ended, recent, still_open, waiting = run_ids
    for run_id in (ended, recent, waiting):
        chain.close(laptop / "runs" / run_id, {"state": "succeeded", "reason": ""})
    old = "2026-01-01T00:00:00Z"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for run_id, deployment, end in (
        (ended, "Complete", old),
        (recent, "Complete", now),
        (still_open, "Running", old),
        (waiting, "Suspended", old),
    ):
        status = {"jobDeploymentStatus": deployment, "endTime": end}
        cluster.objects["rayjobs", f"{run_id}-s1"]["status"] = status
    monkeypatch.setenv("FLEETUNE_HOME", str(laptop))
    monkeypatch.setenv("FLEETUNE_POD", "keeper-1")
    for _ in range(2):
        pod_keeper.main(pod_keeper.pass_command(kubernetes_config("k8s"))[-1])
    left = {name for kind, name in cluster.objects if kind == "rayjobs"}
    assert left == {f"{run_id}-s1" for run_id in (recent, still_open, waiting)}
    assert capsys.readouterr().out == f"RayJob {ended}-s1: removed, as it has been over for 30 days\n"


def rights_in(role: dict[str, Any]) -> set[tuple[str, str]]:
    """The verbs and resources of a role's rules."""
    rights = set()
    for rule in role["rules"]:
        rights |= set(product(rule["verbs"], rule["resources"]))
    return rights


def submit_service(laptop: Path, cluster: Cluster) -> None:
    """A service whose RayService somebody deletes."""
    backend = open_cluster("k8s")
    run_id = "s-0123456789"
    record = {"cluster": "k8s", "submitted": 0.0, "digests": {}, "job": SERVICE.dump()}
    LocalSite(laptop / "runs").create(run_id, record)
    backend.submit(backend.request(SERVICE, run_id))
    metadata = cluster.objects["rayservices", f"{run_id}-s1"]["metadata"]
    metadata["deletionTimestamp"] = "2026-11-22T02:50:53Z"


@pytest.mark.parametrize(
    ("verb", "resource"), [*product(["create", "get", "list"], ["rayjobs", "rayservices"]), ("delete", "rayjobs")]
)
def test_each_right_of_its_role_is_needed(
    verb: str,
    resource: str,
    laptop: Path,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended, failed = (fleetune.submit(make_job(tmp_path, name=name), cluster="k8s").run_id for name in ("a", "b"))
    submit_service(laptop, cluster)
    chain.close(laptop / "runs" / ended, {"state": "succeeded", "reason": ""})
    over = {"jobDeploymentStatus": "Complete", "endTime": "2026-01-01T00:00:00Z"}
    cluster.objects["rayjobs", f"{ended}-s1"]["status"] = over
    cluster.objects["rayjobs", f"{failed}-s1"]["status"] = {"jobDeploymentStatus": "Failed"}
    (role,) = [each for each in keeper_for("k8s") if each["kind"] == "Role"]
    rights = rights_in(role)
    assert (verb, resource) in rights and len(rights) == 7
    cluster.tokens["client"] = rights - {(verb, resource)}
    if verb == "get":  # whether what is refused was made before
        cluster.quota = len([kind for kind, _ in cluster.objects if kind == resource])
    monkeypatch.setenv("FLEETUNE_HOME", str(laptop))
    monkeypatch.setenv("FLEETUNE_POD", "keeper-1")
    said = ""
    try:
        pod_keeper.main(pod_keeper.pass_command(kubernetes_config("k8s"))[-1])
    except Unreachable as error:
        said = str(error)
    said += capsys.readouterr().out
    assert f'cannot {verb} resource "{resource}"' in said
