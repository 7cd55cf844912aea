"""Each permission of the role is needed: without it something fails, in one line that names it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import Cluster

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

from clusters import kubernetes, kubernetes_api
from clusters.base import SubmissionRefused, Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_access import NEEDED, NEEDED_WITH_QUEUE, Permission
from clusters.kubernetes_checkup import KubernetesLook
from clusters.kubernetes_config import KubernetesConfig
from orchestrator.backends import config_of
from runfolder.job import Job

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
RUN_ID = "a-0123456789"
ALL = (*NEEDED, *NEEDED_WITH_QUEUE)


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


USES: dict[str, Callable[[Kubernetes], str]] = {
    "create rayjobs.ray.io": submit_one_more,
    "get rayjobs.ray.io": submit_one_more,
    "list rayjobs.ray.io": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "delete rayjobs.ray.io": lambda backend: str(backend.cancel(RUN_ID)),
    "list pods": lambda backend: backend.status([RUN_ID])[RUN_ID].reason,
    "get pods/exec": lambda backend: str(backend.site.ids()),
    "create pods/exec": lambda backend: str(backend.site.ids()),
    "get persistentvolumeclaims": doctor,
    "list resourcequotas": doctor,
    "list nodes": lambda backend: str(backend.capacity()),
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
    cluster.quota = 1 if permission.verb == "get" and permission.resource == "rayjobs" else None
    if permission.resource != "pods/exec":
        cluster.objects["pods", "reader-1"]["status"]["containerStatuses"][0]["ready"] = False  # nothing needs it
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
