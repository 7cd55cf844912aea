"""Plans for GPUs that are not there: a cluster that does not answer, no GPU at all, a base that is not here."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import make_base, make_job

from clusters.base import Capacity, SubmissionRefused, Unreachable
from clusters.local import Local
from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.plan import Plan, plan
from orchestrator.planning.preflight import check_job

EIGHT = {"gpus_per_node": 8}


@pytest.fixture(autouse=True)
def no_dry_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("orchestrator.planning.memory.can_dry_run", lambda: False)
    monkeypatch.setattr("orchestrator.planning.plan.can_dry_run", lambda: False)
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def source(folder: Path, **changes: Any) -> Path:
    return make_job(folder, **{"method": "lora", **changes})


def warned(found: Plan, begin: str) -> list[str]:
    return [warning for warning in found.warnings if warning.startswith(begin)]


def test_gpus_that_are_spoken_of_are_asked_neither_for_cores_nor_for_their_number(tmp_path: Path) -> None:
    found = plan(source(tmp_path, resources=EIGHT), gpu="H100")
    assert found.workers == 8 and found.precision == "bf16" and not warned(found, "resources")
    assert found.hours is not None and found.fit is not None and found.fit.device == int(79.1 * 2**30)
    cores = plan(source(tmp_path, resources={"workers_per_node": 300}))
    assert warned(cores, "resources: 300 workers share")


def test_this_machines_cluster_would_not_take_gpus_and_is_planned_for_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this machine has no GPU"):
        plan(source(tmp_path, resources=EIGHT), cluster="local")
    found = plan(source(tmp_path, resources=EIGHT), cluster="local", gpu="A100:80")
    (warning,) = warned(found, "local would not take")
    assert "this machine has no GPU" in warning
    assert found.request is None and found.hours is not None


def test_a_cluster_that_does_not_answer_is_planned_for_with_a_gpu_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: Local) -> Capacity:
        raise Unreachable("nobody answers")

    monkeypatch.setattr(Local, "capacity", silent)
    with pytest.raises(Unreachable, match="^cluster local: nobody answers; --gpu H100 plans without its answer$"):
        plan(source(tmp_path), cluster="local")
    found = plan(source(tmp_path), cluster="local", gpu="H200")
    assert warned(found, "planned without an answer: cluster local: nobody answers")
    assert found.fit is not None and found.request is not None


def test_a_far_cluster_that_cannot_be_reached_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = {"hpc": {"kind": "slurm", "link": {"ssh": "nobody@host.invalid"}, "partition": "gpu"}}
    file = tmp_path / "clusters.yaml"
    file.write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(file))
    with pytest.raises(Unreachable, match="cluster hpc: .*; --gpu H100 plans without its answer"):
        plan(source(tmp_path), cluster="hpc")
    found = plan(source(tmp_path), cluster="hpc", gpu="H100")
    assert found.fit is not None and found.fit.fits and found.request is None
    assert warned(found, "planned without an answer: cluster hpc: ")
    assert warned(found, "resources.gpus_per_node: found nothing, so what is sent to hpc asks for no GPU")
    clusters["hpc"]["gpu_type"] = "h200"
    file.write_text(yaml.safe_dump(clusters))
    named = plan(source(tmp_path, resources={"gpus_per_node": 1}), cluster="hpc")
    assert named.fit is not None and named.fit.device == int(139.8 * 2**30) and named.hours is not None
    assert not warned(named, "resources.gpus_per_node")


def test_the_clusters_file_says_the_memory_of_gpus_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = {"bench": {"kind": "local", "root": str(tmp_path / "bench"), "gpu_gib": 24}}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    found = plan(source(tmp_path), cluster="bench")
    assert found.fit is not None and found.fit.device == 24 * 2**30
    assert not warned(found, "resources.gpus_per_node"), "each worker of such a cluster gets one"


def test_more_workers_than_a_cluster_has_gpus_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "capacity", lambda _: Capacity("gpu", 4, 4, "H100"))

    def taken(*_: Any) -> None:
        raise SubmissionRefused("not on this machine")

    monkeypatch.setattr(Local, "request", taken)
    found = plan(source(tmp_path, resources=EIGHT), cluster="local", gpu="H100")
    assert warned(found, "resources: 8 workers of one GPU each; there are 4 GPUs")


def test_a_base_is_planned_by_its_config_and_not_trained(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    whole = plan(source(tmp_path, resources=EIGHT), gpu="H100")
    (tmp_path / "base" / "model.safetensors").unlink()
    by_config = plan(source(tmp_path, resources=EIGHT), gpu="H100")
    assert by_config.sizes == whole.sizes and by_config.fit == whole.fit and by_config.rows == whole.rows
    assert warned(by_config, "base.model: ")[0].endswith("by config.json alone, and a run needs them")
    (tmp_path / "base" / "tokenizer.json").unlink()
    estimated = plan(source(tmp_path, resources=EIGHT), gpu="H100")
    assert estimated.rows == whole.rows and any("no tokenizer" in warning for warning in estimated.warnings)
    shutil.copy(tmp_path / "job.yaml", tmp_path / "other.yaml")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="only safetensors are read"):
        plan(tmp_path / "other.yaml", gpu="H100")


def test_what_is_submitted_needs_weights(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    job, _ = read_job(source(tmp_path))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        check_job(job)
