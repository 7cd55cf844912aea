"""Runs on Kubernetes that really train: the pods of a RayJob are processes here, with real Ray in them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Cluster
from contract import NodeContract, QueueContract, RunContract
from kubelet import Kubelet
from kuberay import KubeRay
from kubernetes_place import KubernetesPlace
from training_runs import assert_undisturbed, begin, train_job
from waiting import until
from worker import OUTSIDE

pytest.importorskip("kubernetes", reason="the client of Kubernetes is not installed: pip install 'fleetune[k8s]'")

import fleetune
from runfolder.appended import read_lines
from runfolder.chain import attempts


@pytest.fixture
def place(laptop: Path, cluster: Cluster, tmp_path: Path) -> Iterator[KubernetesPlace]:
    """The cluster of the laptop, with an operator."""
    configure(tmp_path)
    logs = tmp_path / "pods"
    logs.mkdir()
    operator = KubeRay(cluster, Kubelet(cluster, logs), time_scale=0.02)
    yield KubernetesPlace("k8s", laptop, operator)
    operator.stop()
    assert operator.error is None


def configure(folder: Path, **changes: Any) -> None:
    """Have pods be small, and with one thread."""
    path = folder / "clusters.yaml"
    plain = yaml.safe_load(path.read_text())["k8s"]
    plain |= {"cpus_per_worker": 1, "env": {"OMP_NUM_THREADS": "1"}, **changes}
    path.write_text(yaml.safe_dump({"k8s": plain}))


class TestQueue(QueueContract):
    """Runs that wait."""


@pytest.mark.chaos
class TestRuns(RunContract):
    """Runs on one worker."""


class TestNodes(NodeContract):
    """Runs over both nodes."""


Begin = Callable[..., Path]


@pytest.fixture
def begin_on_both(
    place: KubernetesPlace, tmp_path: Path, tiny_base: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> Begin:
    """Submit a run over both nodes whose steps take two seconds and more, and wait for the third."""
    monkeypatch.syspath_prepend(OUTSIDE)

    def submitted(**settings: Any) -> Path:
        configure(tmp_path, **settings)
        both = {"sharding": {"zero": 3}, "resources": place.resources, "checkpoint": {"every": 5}}
        slow = {"objective": "slow", "env": {"PYTHONPATH": OUTSIDE}, "train": {"steps": 20, "batch_tokens": 128}}
        return begin(place.name, train_job(tmp_path, tiny_base, sums, **both, **slow), steps=3)

    return submitted


def assert_goes_on(run_dir: Path, place: KubernetesPlace, launch: Any, *, saved: bool) -> None:
    """Wait for the end of a run that was disturbed once; where it was `saved`, no step was lost."""
    assert_undisturbed(run_dir, launch, 1200)
    first, second = attempts(run_dir)
    assert first.verdict and first.verdict["kind"] != "success"
    if saved:
        assert first.verdict["kind"] == "preemption"
        assert second.start and second.start.step == read_lines(first, "metrics.jsonl")[-1]["step"]
    assert place.operator.cluster.created == [f"{run_dir.name}-s1"]
    until(place.is_idle, 120)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["worker", "head"])
def test_a_run_whose_pod_is_lost_goes_on(
    kind: str, place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    place.kubelet.lose(place.pods(kind)[0].name)
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
@pytest.mark.timeout(1800)
def test_a_run_that_kueue_suspends_saves_and_goes_on_later(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both(queue="team-a")
    rayjob = place.operator.cluster.objects["rayjobs", f"{run_dir.name}-s1"]
    rayjob["spec"]["suspend"] = True
    until(lambda: rayjob["status"]["jobDeploymentStatus"] == "Suspended" and not place.kubelet.pods, 300)
    status = fleetune.status(run_dir.name)
    assert (status.state, status.reason) == ("preempted", "it waits for Kueue to admit it")
    rayjob["spec"]["suspend"] = False
    assert_goes_on(run_dir, place, launch, saved=True)
    assert "failed" not in rayjob["status"]


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
def test_a_run_does_not_notice_that_the_api_is_away(
    place: KubernetesPlace, begin_on_both: Begin, launch: Any
) -> None:
    run_dir = begin_on_both()
    place.operator.is_up = False
    place.operator.cluster.fault = lambda _: "cut before"
    until(lambda: len(read_lines(attempts(run_dir)[0], "metrics.jsonl")) > 8, 300)
    status = fleetune.status(run_dir.name)
    assert status.state == "unknown" and "Kubernetes: " in str(status.reason)
    place.operator.cluster.fault = lambda _: None
    place.operator.is_up = True
    assert_undisturbed(run_dir, launch, 1200)
    assert len(attempts(run_dir)) == 1
    until(place.is_idle, 120)
