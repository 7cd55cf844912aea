"""`fleetune serve` on Kubernetes: a RayService is made once, says how it stands and where it answers, and is removed.

KubeRay's operator is stood in for by what it would write into the status of the RayService.
"""

from pathlib import Path
from typing import Any

import pytest
from api_server import Cluster
from laptop import configure
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import yaml

import fleetune
from k8s.planned import RUN_LABEL
from orchestrator.cli import app
from orchestrator.errors import InputError
from orchestrator.prune import leftovers
from orchestrator.serve import Serving
from orchestrator.serve_on_cluster import planned_service, serve_on_cluster
from orchestrator.status import list_runs
from orchestrator.terminal.status_text import output_lines, status_lines
from runfolder.chain import close
from runfolder.resources import Resources
from serving.gateway.tenants import hash_of


@pytest.fixture
def serving(laptop: Path, tmp_path: Path) -> Serving:
    """A base on the volume, and an adapter and a tenants file here."""
    assert laptop.exists()
    adapter = tmp_path / "sql"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants:\n- name: alice\n  keys: ['{hash_of('ft-alice')}']\n  adapters: [sql]\n")
    return Serving("cluster:/models/b", (f"sql={adapter}",), tenants, "127.0.0.1", 8000, None)


def submit(serving: Serving) -> str:
    """The run id of a service on two GPUs."""
    return serve_on_cluster(serving, "k8s", "mine", Resources(gpus_per_node=2, grace=60)).run_id


def services(cluster: Cluster) -> set[str]:
    return {name for kind, name in cluster.objects if kind == "rayservices"}


def set_status(cluster: Cluster, name: str, ready: str, reason: str, state: str = "", message: str = "") -> None:
    """What KubeRay's operator writes into a RayService."""
    condition = {"type": "Ready", "status": ready, "reason": reason, "message": message}
    found: dict[str, Any] = {"rayClusterName": f"{name}-x2v4t"}
    if state:
        found["applicationStatuses"] = {"fleetune": {"status": state, "message": message}}
    part = "activeServiceStatus" if ready == "True" else "pendingServiceStatus"
    cluster.objects["rayservices", name]["status"] = {"conditions": [condition], part: found}


def add_pod(cluster: Cluster, run_id: str, ready: bool) -> None:
    """A pod of the cluster of Ray that a service has."""
    labels = {"app.kubernetes.io/managed-by": "fleetune", RUN_LABEL: run_id, "ray.io/cluster": f"{run_id}-s1-x2v4t"}
    status = {"phase": "Running", "containerStatuses": [{"name": "ray-head", "ready": ready}]}
    pod = {"metadata": {"name": "head", "labels": labels}, "spec": {"nodeName": "gpu-1"}, "status": status}
    cluster.objects["pods", "head"] = pod


def test_it_is_submitted_says_how_it_stands_and_where_it_answers_and_is_cancelled(
    serving: Serving, laptop: Path, cluster: Cluster, tmp_path: Path
) -> None:
    planned = yaml.safe_load(planned_service(serving, "k8s", "mine", Resources(gpus_per_node=2, grace=60)))
    assert not cluster.created
    run_id = submit(serving)
    name = f"{run_id}-s1"
    assert cluster.created == [name] and services(cluster) == {name}
    stored = cluster.objects["rayservices", name]
    assert planned["spec"].keys() == stored["spec"].keys()
    (application,) = yaml.safe_load(stored["spec"]["serveConfigV2"])["applications"]
    brought = application["args"]
    assert "ft-alice" not in str(stored) and brought["base"] == "/models/b"
    assert Path(brought["tenants"]).read_bytes() == (tmp_path / "tenants.yaml").read_bytes()
    assert Path(brought["adapters"]["sql"], "adapter_config.json").is_relative_to(laptop)

    status = fleetune.status(run_id)
    assert (status.state, status.address) == ("queued", None)
    assert status.reason == f"RayService {name}: KubeRay's operator has not taken it up yet"
    set_status(cluster, name, "False", "Initializing")
    add_pod(cluster, run_id, ready=False)
    assert fleetune.status(run_id).reason == f"RayService {name}: 0 of 1 pods are ready"
    add_pod(cluster, run_id, ready=True)
    set_status(cluster, name, "False", "ZeroServeEndpoints", "DEPLOYING")
    status = fleetune.status(run_id)
    assert status.state == "starting"
    assert status.reason == f"RayService {name}: 1 of 1 pods are ready; its application is DEPLOYING"
    set_status(cluster, name, "False", "Initializing", "DEPLOY_FAILED", "Traceback\n  adapter sql: found no weights")
    status = fleetune.status(run_id)
    assert (status.state, status.stuck) == ("starting", True)
    assert str(status.reason).endswith("its application does not start: Traceback adapter sql: found no weights")

    set_status(cluster, name, "True", "NonZeroServeEndpoints", "RUNNING")
    status = fleetune.status(run_id)
    assert (status.state, status.address) == ("running", f"http://{name}-serve-svc.fleetune.svc:8000")
    assert [run.address for run in list_runs("k8s")] == [status.address]
    forward = f"kubectl --context test -n fleetune port-forward service/{name}-serve-svc 8000:8000"
    configure(tmp_path, context="test")
    assert dict(output_lines(status))["from here"] == f"{forward}    # then http://127.0.0.1:8000"
    assert not {"attempt", "progress"} & dict(status_lines(status)).keys()

    fleetune.cancel(run_id)
    assert not services(cluster)
    status = fleetune.status(run_id)
    assert (status.state, status.address) == ("cancelled", None)


def test_one_that_somebody_deletes_is_made_again_until_it_is_cancelled(serving: Serving, cluster: Cluster) -> None:
    run_id = submit(serving)
    name = f"{run_id}-s1"
    stored = cluster.objects["rayservices", name]
    set_status(cluster, name, "True", "NonZeroServeEndpoints", "RUNNING")
    stored["metadata"]["finalizers"] = ["ray.io/rayservice-finalizer"]
    cluster.remove("rayservices", name)
    status = fleetune.status(run_id)
    assert status.reason == f"its RayService has ended, and it was submitted again: RayService {run_id}-s2"
    for _ in range(2):
        assert fleetune.status(run_id).state == "queued"
    assert cluster.created == [name, f"{run_id}-s2"]
    fleetune.cancel(run_id)
    assert services(cluster) == {name}, "which its finalizer keeps"
    assert fleetune.status(run_id).state == "cancelled"
    assert cluster.created == [name, f"{run_id}-s2"]


def test_what_lives_is_not_left_over_and_one_whose_run_has_ended_is(
    serving: Serving, laptop: Path, cluster: Cluster
) -> None:
    run_id = submit(serving)
    name = f"{run_id}-s1"
    set_status(cluster, name, "True", "NonZeroServeEndpoints", "RUNNING")
    add_pod(cluster, run_id, ready=True)
    assert leftovers("k8s") == []
    close(laptop / "runs" / run_id, {"state": "cancelled", "reason": ""})
    (found,) = leftovers("k8s")
    assert (found.what, found.why) == (f"RayService {name}", "its run has ended, and it goes on")


def test_what_the_server_does_not_take_is_said_in_one_line(serving: Serving, cluster: Cluster) -> None:
    cluster.quota = 0
    with pytest.raises(InputError, match="exceeded quota.*count/rayservices.ray.io") as told:
        submit(serving)
    assert "\n" not in str(told.value) and not services(cluster)
    with pytest.raises(InputError, match="^resources.walltime: allowed for a service on Kubernetes: none"):
        serve_on_cluster(serving, "k8s", "mine", Resources(walltime=60, grace=60))


def test_the_command_prints_the_run_id(serving: Serving, cluster: Cluster) -> None:
    options = ["--base", serving.base, "--adapters", *serving.adapters, "--tenants", str(serving.tenants_file)]
    ran = CliRunner().invoke(app, ["serve", "--cluster", "k8s", *options], catch_exceptions=False)
    assert ran.exit_code == 0
    (name,) = services(cluster)
    assert ran.stdout == f"{name.removesuffix('-s1')}\n"
