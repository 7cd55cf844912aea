"""The server of these tests answers as a real one did: what it is asked, and what kube-apiserver 1.36 had said."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Cluster, served

RECORDED = json.loads(Path(__file__).with_name("recorded_answers.json").read_text())
RAYJOBS = "/apis/ray.io/v1/namespaces/probe/rayjobs"
POD = {"template": {"spec": {"containers": [{"name": "ray", "image": "ray"}]}}}


def rayjob(name: str, **spec: Any) -> dict[str, Any]:
    plain = {"entrypoint": "true", "rayClusterSpec": {"headGroupSpec": POD}, **spec}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"run": "1"}},
        "spec": plain,
    }


def labelled(name: str, value: str) -> dict[str, Any]:
    body = rayjob(name)
    return {**body, "metadata": {**body["metadata"], "labels": {"run": value}}}


CREATED = {
    "dup": rayjob("a"),
    "bad name": rayjob("Bad_Name"),
    "long label": labelled("ll", "a" * 64),
    "wrong type entrypoint": rayjob("wt", entrypoint=3),
    "missing headGroupSpec": rayjob("mr", rayClusterSpec={}),
    "bad enum upscalingMode": rayjob(
        "be2", rayClusterSpec={"headGroupSpec": POD, "autoscalerOptions": {"upscalingMode": "Nope"}}
    ),
}
OF_ACCOUNT = "system:serviceaccount:probe:sa1"


@pytest.fixture
def cluster() -> Cluster:
    """A cluster that has one RayJob, `a`, and an account that may do nothing."""
    cluster = Cluster(namespace="probe", tokens={"admin": None, OF_ACCOUNT: set()})
    cluster.answer("POST", RAYJOBS, {}, rayjob("a"), "admin")
    return cluster


@pytest.fixture
def address(cluster: Cluster) -> Iterator[str]:
    with served(cluster) as address:
        yield address


def ask(address: str, method: str, path: str, body: Any = None, token: str = "admin") -> tuple[int, Any]:
    """The status and the body that a server answers with."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address + path, data, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def assert_recorded(name: str, answered: tuple[int, Any]) -> None:
    recorded = RECORDED[name]
    code, body = answered
    assert (code, body["reason"]) == (recorded["code"], recorded["reason"])
    causes = [[cause["reason"], cause["field"]] for cause in body["details"]["causes"]]
    assert causes == recorded["causes"]
    assert recorded["message"].startswith(body["message"][:110]), body["message"]


@pytest.mark.parametrize("name", CREATED)
def test_what_is_not_created(name: str, address: str) -> None:
    assert_recorded(name, ask(address, "POST", RAYJOBS, CREATED[name]))


def test_unknown_fields_are_pruned_or_refused(address: str, cluster: Cluster) -> None:
    body = rayjob("uf", bogus=1)
    assert_recorded("unknown field", ask(address, "POST", f"{RAYJOBS}?fieldValidation=Strict", body))
    code, stored = ask(address, "POST", RAYJOBS, body)
    assert code == 201 and "bogus" not in stored["spec"]
    assert {"uid", "resourceVersion", "generation", "creationTimestamp"} <= stored["metadata"].keys()
    assert cluster.objects["rayjobs", "uf"] == stored


def test_a_dry_run_leaves_nothing(address: str) -> None:
    assert ask(address, "POST", f"{RAYJOBS}?dryRun=All", rayjob("dry"))[0] == 201
    assert_recorded("dry persisted", ask(address, "GET", f"{RAYJOBS}/dry"))


def test_a_wrong_place_is_told_from_a_wrong_version(address: str) -> None:
    assert_recorded("missing namespace", ask(address, "POST", RAYJOBS.replace("probe", "nope"), rayjob("b")))
    assert ask(address, "GET", RAYJOBS.replace("v1", "v9")) == (404, "404 page not found\n")


def test_who_may_not_is_told_so(address: str) -> None:
    assert_recorded("RBAC list", ask(address, "GET", RAYJOBS, token=OF_ACCOUNT))
    assert_recorded("RBAC create", ask(address, "POST", RAYJOBS, rayjob("b"), token=OF_ACCOUNT))
    assert_recorded("bad token", ask(address, "GET", RAYJOBS, token="nobody"))


def test_a_quota_counts_what_is_there(address: str, cluster: Cluster) -> None:
    cluster.quota = 1
    assert_recorded("quota", ask(address, "POST", RAYJOBS, rayjob("b")))


def test_only_what_is_meant_is_deleted(address: str) -> None:
    assert ask(address, "POST", RAYJOBS, rayjob("uf"))[0] == 201
    wrong = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    assert_recorded("delete with wrong uid", ask(address, "DELETE", f"{RAYJOBS}/uf", wrong))
    assert ask(address, "DELETE", f"{RAYJOBS}/a")[0] == 200
    assert_recorded("delete missing", ask(address, "DELETE", f"{RAYJOBS}/a"))


def test_lists_are_by_label_and_come_in_pages(address: str, cluster: Cluster) -> None:
    for name in ("b", "c"):
        ask(address, "POST", RAYJOBS, rayjob(name))
    ask(address, "POST", RAYJOBS, labelled("other", "2"))
    _, first = ask(address, "GET", f"{RAYJOBS}?labelSelector=run%3D1&limit=2")
    assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
    more = first["metadata"]["continue"]
    _, second = ask(address, "GET", f"{RAYJOBS}?labelSelector=run%3D1&limit=2&continue={more}")
    assert [item["metadata"]["name"] for item in second["items"]] == ["c"]
    cluster.expired.add(more)
    assert ask(address, "GET", f"{RAYJOBS}?limit=2&continue={more}")[0] == 410


def test_what_has_a_finalizer_is_deleted_once_that_is_let_go(address: str, cluster: Cluster) -> None:
    finalized = rayjob("fin")
    finalized["metadata"]["finalizers"] = ["x.io/f"]
    ask(address, "POST", RAYJOBS, finalized)
    for _ in range(2):
        code, deleted = ask(address, "DELETE", f"{RAYJOBS}/fin")
        assert code == 200 and deleted["metadata"]["deletionTimestamp"]
        assert ask(address, "GET", f"{RAYJOBS}/fin")[1]["metadata"]["deletionTimestamp"]
    cluster.objects["rayjobs", "fin"]["metadata"].pop("finalizers")
    assert ask(address, "DELETE", f"{RAYJOBS}/fin")[0] == 200
    assert ask(address, "GET", f"{RAYJOBS}/fin")[0] == 404


def test_a_list_of_a_namespace_that_is_not_there_is_empty(address: str) -> None:
    code, listed = ask(address, "GET", RAYJOBS.replace("probe", "nope"))
    assert (code, listed["items"]) == (200, [])
