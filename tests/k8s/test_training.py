"""Runs on Kubernetes that really train: the pods of a RayJob are processes here, with real Ray in them."""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from api_server import served
from contract import NodeContract, QueueContract, RunContract
from kubelet import Kubelet
from kuberay import KubeRay
from kubernetes_place import KubernetesPlace
from laptop import configure, use_laptop, write_laptop
from sampling import SEED
from small_cluster import small_cluster
from training_runs import LONG, SECRET, assert_undisturbed, begin, train_job, wait_for
from waiting import until
from worker import OUTSIDE

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from orchestrator.serve import Serving
from orchestrator.serve_on_cluster import serve_on_cluster
from runfolder.appended import read_lines
from runfolder.chain import attempts
from runfolder.resources import Resources
from serving.gateway.tenants import hash_of


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeRay]:
    """A cluster with an operator, whose reader's environment finds this installation."""
    folder = tmp_path_factory.mktemp("kubernetes")
    cluster = small_cluster(folder)
    found = KubeRay(cluster, Kubelet(cluster, folder), time_scale=0.02)
    yield found
    found.stop()
    assert found.error is None


@pytest.fixture(scope="module")
def site(operator: KubeRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a kubeconfig and a clusters file for it, and the volume."""
    with served(operator.cluster) as address:
        folder = tmp_path_factory.mktemp("laptop")
        write_laptop(folder, address)
        yield folder


@pytest.fixture
def place(
    operator: KubeRay, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KubernetesPlace]:
    """The cluster, as a laptop has it that knows no run; afterwards it is as before, whatever a test has left."""
    configure(site, cpus_per_worker=1, env={"OMP_NUM_THREADS": "1"}, queue=None)
    use_laptop(site, tmp_path / "home", monkeypatch)
    place = KubernetesPlace("k8s", site / "volume", operator)
    yield place
    operator.is_up = operator.admits = True
    operator.cluster.fault = lambda _: None
    place.forget_all()


class TestQueue(QueueContract):
    """Runs that wait."""


@pytest.mark.chaos
class TestRuns(RunContract):
    """Runs on one worker."""


class TestNodes(NodeContract):
    """Runs over both nodes."""


Begin = Callable[..., Path]
CHEAP = ("waiting", "starting")  # endings before Ray is up
ENDINGS = (*CHEAP, "running", "deleted", "succeeded", "failed")


@pytest.fixture
def begin_on_both(
    place: KubernetesPlace, site: Path, tmp_path: Path, tiny_base: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> Begin:
    """Submit a run over both nodes whose steps take two seconds and more, and wait for its first checkpoint."""
    monkeypatch.syspath_prepend(OUTSIDE)

    def submitted(steps: int = 20, **settings: Any) -> Path:
        configure(site, **settings)
        both = {"sharding": {"zero": 3}, "resources": place.resources, "checkpoint": {"every": 3}}
        slow = {
            "objective": "slow",
            "env": {"PYTHONPATH": OUTSIDE, **SECRET},
            "train": {"steps": steps, "batch_tokens": 128},
        }
        run_dir = begin(place.name, train_job(tmp_path, tiny_base, sums, **both, **slow), steps=3)
        until(lambda: list(run_dir.glob("attempts/1/checkpoints/*/manifest.json")), 300)
        return run_dir

    return submitted


def assert_goes_on(run_dir: Path, place: KubernetesPlace, launch: Any, *, saved: bool) -> None:
    """Wait for the end of a run that was disturbed once; where it was `saved`, no step was lost."""
    assert_undisturbed(run_dir, launch, 1200)
    first, second = attempts(run_dir)
    assert second.start
    if saved:
        assert first.verdict and first.verdict["kind"] == "preemption"
        assert second.start.step == read_lines(first, "metrics.jsonl")[-1]["step"]
    assert place.operator.cluster.created[-1] == f"{run_dir.name}-s1"
    until(place.is_idle, 120)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["worker", "head"])
def test_a_run_whose_pod_is_lost_goes_on(
    kind: str, place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    place.kubelet.lose(place.pods(kind)[0].name)
    if kind == "head":
        until(lambda: "its head has not answered since" in str(fleetune.status(run_dir.name).reason))
    assert_goes_on(run_dir, place, launch, saved=False)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["worker", "head"])
def test_a_run_whose_node_is_drained_saves_first(
    kind: str, place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    place.kubelet.delete(place.pods(kind)[0].name)
    assert_goes_on(run_dir, place, launch, saved=True)


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_a_run_whose_node_does_not_come_back_goes_on_in_another_cluster(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    lost = place.pods("worker")[0]
    place.kubelet.lose_node(lost.name, math.inf)
    until(lambda: attempts(run_dir)[0].verdict, 300)
    assert f"pod {lost.name} is not ready, or its node is lost" in str(fleetune.status(run_dir.name).reason)
    assert_undisturbed(run_dir, launch, 1800)  # ten minutes of which it waits
    first, *others = attempts(run_dir)  # one of them may have begun before Ray knew that the node is lost
    assert first.verdict and first.verdict["kind"] == "node_lost" and others[-1].start
    assert [path.name for path in sorted((run_dir / "starts").iterdir())] == ["1.0", "1.1"]
    until(lambda: [*place.kubelet.pods] == [lost.name], 120)  # its object goes with its node
    place.kubelet.lose(lost.name)
    until(place.is_idle, 120)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_that_kueue_suspends_saves_and_goes_on_later(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both(queue="team-a")
    rayjob = place.operator.cluster.objects["rayjobs", f"{run_dir.name}-s1"]
    place.operator.admits = False
    until(lambda: rayjob["status"]["jobDeploymentStatus"] == "Suspended" and not place.kubelet.pods, 300)
    status = fleetune.status(run_dir.name)
    assert (status.state, status.reason) == ("preempted", "Kueue: it waits for queue team-a to admit it")
    place.operator.admits = True
    assert_goes_on(run_dir, place, launch, saved=True)
    assert "failed" not in rayjob["status"]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_that_kuberay_gives_up_goes_on_by_its_next_submission(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = begin_on_both()
    monkeypatch.setattr(place.operator, "gives_up_s", 5.0)
    with place.filled():  # no node for another head
        place.kubelet.lose(place.pods("head")[0].name)
        status = wait_for(run_dir.name, "preempted")  # who looks submits it again
        assert str(status.reason) == f"its RayJob has ended, and it was submitted again: RayJob {run_dir.name}-s2"
    assert_undisturbed(run_dir, launch, 1200)
    assert place.operator.cluster.created[-2:] == [f"{run_dir.name}-s1", f"{run_dir.name}-s2"]
    assert [path.name for path in sorted((run_dir / "starts").iterdir())] == ["1.0", "2.0"]
    until(place.is_idle, 120)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_an_operator_that_was_away_replaces_what_was_lost_meanwhile(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    place.operator.is_up = False
    place.kubelet.lose(place.pods("worker")[0].name)
    until(lambda: attempts(run_dir)[0].verdict, 300)
    assert fleetune.status(run_dir.name).state == "preempted"
    place.operator.is_up = True
    assert_goes_on(run_dir, place, launch, saved=False)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_does_not_notice_that_the_api_is_away_for_a_minute(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both(steps=60)  # of which the minute has half
    place.operator.is_up = False
    place.operator.cluster.fault = lambda _: "cut before"
    steps = len(read_lines(attempts(run_dir)[0], "metrics.jsonl"))
    time.sleep(60)
    until(lambda: len(read_lines(attempts(run_dir)[0], "metrics.jsonl")) > steps, 300)
    status = fleetune.status(run_dir.name)
    assert status.state == "unknown" and "Kubernetes: " in str(status.reason)
    place.operator.cluster.fault = lambda _: None
    place.operator.is_up = True
    assert_undisturbed(run_dir, launch, 1200)
    assert len(attempts(run_dir)) == 1
    until(place.is_idle, 120)


def submit_and_end(ending: str, place: KubernetesPlace, job: Callable[..., Path]) -> None:
    """Submit a run, and see it to an ending of this kind."""
    state = "cancelled"
    if ending == "waiting":
        with place.filled():
            run_id = fleetune.submit(job(), cluster=place.name).run_id
            wait_for(run_id, "queued")
            fleetune.cancel(run_id)
    elif ending == "starting":
        run_id = fleetune.submit(job(**LONG), cluster=place.name).run_id
        wait_for(run_id, "starting")
        fleetune.cancel(run_id)
    elif ending in ("running", "deleted"):
        run_id = begin(place.name, job(train={"steps": 100_000, "batch_tokens": 512}), steps=2).name
        if ending == "deleted":
            place.forget(run_id)
        fleetune.cancel(run_id)
    elif ending == "succeeded":
        run_id, state = fleetune.submit(job(), cluster=place.name).run_id, "succeeded"
    else:
        rows = place.root / "rows.jsonl"
        row = json.dumps({"prompt": "1 + 1 =", "completion": " 2"})
        rows.write_text(f"{row}\n" * 50)
        with place.filled():
            run_id, state = fleetune.submit(job(f"cluster:{rows}"), cluster=place.name).run_id, "failed"
            rows.write_text("")
    wait_for(run_id, state)


def left_processes(place: KubernetesPlace) -> list[str]:
    """The commands of processes that are of some run or pod."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(place.root / "runs") in command or str(place.kubelet.folders) in command:
            found.append(command)
    return found


def objects_but_rayjobs(place: KubernetesPlace) -> set[tuple[str, str]]:
    """The objects of the cluster by kind and name; RayJobs stay for those who look at them."""
    return {(kind, name) for kind, name in place.operator.cluster.objects if kind != "rayjobs"}


@pytest.mark.parametrize("number", [2, pytest.param(50, marks=[pytest.mark.chaos, pytest.mark.timeout(0)])])
def test_no_pod_outlives_its_run(
    number: int, place: KubernetesPlace, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    job = partial(train_job, tmp_path, tiny_base)
    before = objects_but_rayjobs(place)
    rng = random.Random(SEED)
    for count in range(number):
        ending = CHEAP[count] if number == len(CHEAP) else rng.choice(ENDINGS)
        began = time.monotonic()
        submit_and_end(ending, place, lambda rows=sums, **changes: job(rows, **changes))
        until(place.is_idle, 180)
        assert left_processes(place) == []
        assert objects_but_rayjobs(place) == before
        print(f"{count}: {ending}, {place.kubelet.made} pods so far; {time.monotonic() - began:.0f} s", flush=True)
    assert place.kubelet.made >= number


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_service_answers_until_it_is_cancelled(place: KubernetesPlace, tiny_base: Path, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants:\n- name: alice\n  keys: ['{hash_of('ft-alice')}']\n  adapters: ['*']\n")
    serving = Serving(f"cluster:{tiny_base}", (), tenants, "127.0.0.1", 8000, None)
    run_id = serve_on_cluster(serving, place.name, "mine", Resources(grace=60)).run_id
    until(lambda: fleetune.status(run_id).address, 600)
    assert fleetune.status(run_id).state == "running"
    (cluster,) = place.operator.ray_clusters.values()
    body = {"model": tiny_base.name, "prompt": "1 + 2 =", "max_tokens": 5}
    headers = {"Authorization": "Bearer ft-alice"}
    url = f"http://127.0.0.1:{cluster.serves_at}/v1/completions"
    answer = httpx2.post(url, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"]
    assert httpx2.post(url, json=body, timeout=60).status_code == 401
    fleetune.cancel(run_id)
    until(place.is_idle, 120)
    until(lambda: ("rayservices", f"{run_id}-s1") not in place.operator.cluster.objects)
    assert fleetune.status(run_id).state == "cancelled"
