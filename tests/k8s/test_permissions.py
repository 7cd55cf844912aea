"""Each permission of the role is needed: without it something fails, in one line that names it."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import Cluster
from jobs import make_job

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from clusters import kubernetes, kubernetes_api
from clusters.base import SubmissionRefused, Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_access import NEEDED, NEEDED_WITH_QUEUE, WISHED, Permission
from clusters.kubernetes_checkup import KubernetesLook
from clusters.kubernetes_config import KubernetesConfig
from orchestrator.backends import config_of
from runfolder.job import Job
from runfolder.service import ServiceSpec

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
SERVICE = ServiceSpec(base="/fleetune/bases/b", tenants="/fleetune/tenants.yaml")
RUN_ID = "a-0123456789"
ALL = (*NEEDED, *NEEDED_WITH_QUEUE, *WISHED)


@pytest.fixture
def backend(laptop: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    """The cluster with a queue, a run that waits in it, and no room for another one."""
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(kubernetes, "note_try_in", lambda *_: None)  # there is no run folder
    config = config_of("k8s")
    assert isinstance(config, KubernetesConfig)
    backend = Kubernetes(config.model_copy(update={"queue": "team-a"}), laptop)
    cluster.general.pending = []
    backend.submit(backend.request(JOB, RUN_ID))
    cluster.objects["rayjobs", f"{RUN_ID}-s1"]["status"] = {"jobDeploymentStatus": "Suspended"}
    return backend


def submit_one_more(backend: Kubernetes) -> str:
    backend.submit(backend.request(JOB, "b-0123456789"))
    return ""


def doctor(backend: Kubernetes) -> str:
    """What the doctor says of what is not well."""
    checks = KubernetesLook("k8s", backend).checks()
    found = [check.found for check in checks if check.level != "ok" and check.name in ("volume", "quota")]
    return " ".join(found)


def serve(backend: Kubernetes) -> str:
    backend.submit(backend.request(SERVICE, "s-0123456789"))
    return ""


USES: dict[str, Callable[[Kubernetes], str]] = {
    "create rayjobs.ray.io": submit_one_more,
    "get rayjobs.ray.io": submit_one_more,
    "list rayjobs.ray.io": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "delete rayjobs.ray.io": lambda backend: str(backend.cancel(RUN_ID)),
    "create rayservices.ray.io": serve,
    "get rayservices.ray.io": serve,
    "list rayservices.ray.io": lambda backend: backend.status(["s-0123456789"])["s-0123456789"].reason,
    "delete rayservices.ray.io": lambda backend: serve(backend) or str(backend.cancel("s-0123456789")),
    "list pods": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "get pods/exec": lambda backend: str(backend.site.ids()),
    "create pods/exec": lambda backend: str(backend.site.ids()),
    "get persistentvolumeclaims": doctor,
    "list resourcequotas": doctor,
    "list nodes": lambda backend: str(backend.capacity()),
    "list events": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "list workloads.kueue.x-k8s.io": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "get localqueues/pendingworkloads.visibility.kueue.x-k8s.io": lambda backend: (
        backend.status([RUN_ID])[RUN_ID].reason
    ),
}


@pytest.mark.parametrize("permission", ALL, ids=str)
def test_without_it_something_fails_in_a_line_that_names_it(
    permission: Permission, backend: Kubernetes, cluster: Cluster
) -> None:
    allowed = cluster.tokens["client"]
    assert allowed is not None
    if permission.verb == "get" and permission.group == "ray.io":  # it is asked for after a refusal
        cluster.quota = len([kind for kind, _ in cluster.objects if kind == permission.resource])
    if permission.resource != "pods/exec":
        cluster.objects["pods", "reader-1"]["status"]["containerStatuses"][0]["ready"] = False  # nothing needs it
    if permission.resource == "events":
        cluster.objects["rayjobs", f"{RUN_ID}-s1"]["status"] = {"jobDeploymentStatus": "Initializing"}
    allowed.remove((permission.verb, permission.resource))
    try:
        said = USES[str(permission)](backend)
    except (Unreachable, SubmissionRefused) as error:
        said = str(error)
    assert f'cannot {permission.verb} resource "{permission.resource}"' in said
    assert "\n" not in said and len(said) < 500, said


def test_the_doctor_names_all_that_lack(backend: Kubernetes, cluster: Cluster) -> None:
    cluster.objects.pop(("pods", "reader-1"))
    cluster.tokens["client"] = set()
    checks = {check.name: check for check in KubernetesLook("k8s", backend).checks()}
    named = ", ".join(f"{permission} ({permission.what_for})" for permission in ALL)
    assert checks["permissions"].found == f"not allowed: {named}"
    assert "create rolebinding NAME --role=fleetune-client" in checks["permissions"].mend


def test_who_may_not_list_nodes_submits_with_a_warning(
    laptop: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert laptop.exists()
    monkeypatch.setattr(kubernetes_api, "_FIRST_PAUSE_S", 0.0)
    bind(cluster, "kubectl create rolebinding alice --role=fleetune-client --user=client")
    submitted = fleetune.submit(make_job(tmp_path), cluster="k8s")
    assert cluster.created == [f"{submitted.run_id}-s1"]
    (warning,) = [warning for warning in submitted.warnings if warning.startswith("resources: ")]
    assert warning.startswith("resources: whether the job fits is not known (")
    assert 'cannot list resource "nodes"' in warning


def bind(cluster: Cluster, *commands: str) -> None:
    """Let the client do what its account may do after these commands of kubectl alone."""
    for number, command in enumerate(commands):
        options = dict(word.split("=") for word in shlex.split(command) if "=" in word)
        kind = "ClusterRole" if "--clusterrole" in options else "Role"
        name = options.get("--clusterrole") or options["--role"]
        cluster.general.stored[f"binding {number}"] = {
            "kind": f"{kind}Binding",
            "metadata": {"name": "alice"},
            "roleRef": {"kind": kind, "name": name},
            "subjects": [{"name": options["--user"]}],
        }
    cluster.tokens["client"] = cluster.general.rights("client")


@pytest.mark.parametrize("lacking", [{("list", "nodes")}, {("list", "pods")}, None], ids=["nodes", "pods", "all"])
def test_what_mends_a_lacking_permission_mends_it(
    lacking: set[tuple[str, str]] | None, backend: Kubernetes, cluster: Cluster
) -> None:
    cluster.objects["pods", "reader-1"]["status"]["containerStatuses"][0]["ready"] = False  # nothing needs it
    allowed = cluster.tokens["client"] or set()
    cluster.tokens["client"] = allowed - lacking if lacking else set()
    (check,) = [check for check in KubernetesLook("k8s", backend).checks() if check.name == "permissions"]
    assert check.level == ("warn" if lacking == {("list", "nodes")} else "fail")
    commands = check.mend.removeprefix("have an administrator run: ").replace("=YOU", "=client").split(" && ")
    bind(cluster, *commands)
    after = cluster.tokens["client"]
    if lacking:
        assert after is not None and lacking <= after
        return
    (check,) = [check for check in KubernetesLook("k8s", backend).checks() if check.name == "permissions"]
    assert check.level == "ok", check
