"""A job of two stages from the submission to its end, on a local cluster with real Ray and MLflow (make chaos).

In `make test`, test_stages_work.py lets its controller die at each write, and test_constitution.py does all stages.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from training_runs import wait_for
from trapped import CAN_TRAP, WHY_NOT, trapped_cluster

import fleetune
from clusters import process
from clusters.local import Local
from orchestrator.tracking.store import PARENT_TAG, RUN_ID_TAG, counting_run
from runfolder.chain import attempts, result
from runfolder.stages import noted_stage, stage_folders

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(not CAN_TRAP, reason=WHY_NOT), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A local cluster with room for two workers."""
    with trapped_cluster(tmp_path_factory) as cluster:
        yield cluster


def write_job(folder: Path, base: Path, sums: Path, beta: float = 0.1) -> Path:
    """Sums are learned, then preferred to wrong ones by the model that has learned them."""
    pairs = []
    for line in sums.read_text().splitlines()[:40]:
        row = json.loads(line)
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    job: dict[str, Any] = {
        "name": "two",
        "base": str(base),
        "method": {"kind": "lora", "rank": 2},
        "resources": {"workers_per_node": 1},
        "evaluation": {"max_new_tokens": 0},
        "stages": {
            "sft": {"data": {"train": str(sums), "seq_len": 64}, "train": {"steps": 6, "batch_tokens": 256}},
            "dpo": {
                "base": "stage:sft",
                "objective": {"kind": "dpo", "beta": beta},
                "data": {"train": "pairs.jsonl", "seq_len": 96},
                "train": {"steps": 4, "batch_tokens": 256},
            },
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def mlflow_runs(run_dir: Path) -> tuple[MlflowClient, Any, list[Any]]:
    """The client, the MLflow run of a job, and those below it."""
    record = counting_run(run_dir)
    assert record is not None
    client = MlflowClient(tracking_uri=record["uri"])
    parent = client.get_run(record["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    return client, parent, list(children)


def test_a_model_is_tuned_then_preferred_and_what_has_not_changed_is_not_done_again(
    cluster: Local, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    job = write_job(tmp_path, tiny_base, sums)
    submitted = fleetune.submit(job)
    assert submitted.run_dir.parent == cluster.site.root
    status = wait_for(submitted.run_id, "succeeded")
    run_dir = submitted.run_dir
    folders = stage_folders(run_dir, ["sft", "dpo"])
    assert [len(attempts(folder)) for folder in folders.values()] == [1, 1]
    assert status.stage is not None and status.stage["run_id"] == folders["dpo"].name
    assert status.output_dir == str(folders["dpo"] / "output") and (folders["dpo"] / "output").is_dir()
    assert fleetune.fetch(submitted.run_id, tmp_path / "fetched").joinpath("output/adapter_config.json").exists()
    first = json.loads((folders["dpo"] / "attempts/1/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the model that the stage begins with"
    adapter = json.loads((folders["dpo"] / "output/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folders["sft"] / "output/merged")

    _, parent, children = mlflow_runs(run_dir)
    assert parent.data.tags[RUN_ID_TAG] == submitted.run_id and parent.info.status == "FINISHED"
    assert {child.data.tags[RUN_ID_TAG] for child in children} == {folder.name for folder in folders.values()}
    assert {child.info.status for child in children} == {"FINISHED"}

    again = fleetune.submit(write_job(tmp_path, tiny_base, sums, beta=0.2))
    assert again.run_id != submitted.run_id
    wait_for(again.run_id, "succeeded")
    assert stage_folders(again.run_dir, ["sft"])["sft"] == folders["sft"], "its inputs are those of before"
    other = stage_folders(again.run_dir, ["dpo"])["dpo"]
    assert other != folders["dpo"] and len(attempts(other)) == 1
    assert len(attempts(folders["sft"])) == 1
    ended = result(again.run_dir)
    assert ended is not None and ended["reason"] == "done before: sft"


def test_it_is_cancelled_and_resumed_as_one_and_stands_the_death_of_its_controller(
    cluster: Local, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    job = write_job(tmp_path, tiny_base, sums)
    overrides = ["stages.sft.train.steps=40", "stages.sft.checkpoint.every=5", "stages.sft.train.seed=1"]
    submitted = fleetune.submit(job, overrides=overrides)
    run_dir = submitted.run_dir
    while wait_for(submitted.run_id, "queued", "starting", "running").step < 6:
        time.sleep(0.1)
    holder = process.owner(cluster.controller_lock(submitted.run_id))
    assert holder is not None
    os.kill(holder, signal.SIGKILL)
    sft = stage_folders(run_dir, ["sft"])["sft"]
    while len(attempts(sft)) < 2:
        assert result(run_dir) is None
        time.sleep(0.1)
    fleetune.cancel(submitted.run_id, save=True)
    status = wait_for(submitted.run_id, "cancelled")
    assert status.reason is not None and status.reason.startswith("stage sft: ")
    assert noted_stage(run_dir, "dpo") is None
    ended = result(sft)
    assert ended is not None and ended["state"] == "cancelled"
    with pytest.raises(fleetune.InputError, match=f"it is a stage of {submitted.run_id}"):
        fleetune.resume(sft.name)
    fleetune.resume(submitted.run_id)
    wait_for(submitted.run_id, "succeeded")
    _, parent, children = mlflow_runs(run_dir)
    assert parent.info.status == "FINISHED" and len(children) == 2
    client = MlflowClient(tracking_uri=counting_run(run_dir)["uri"])  # type: ignore[index]
    of_sft = next(child for child in children if child.data.tags[RUN_ID_TAG] == sft.name)
    steps = [metric.step for metric in client.get_metric_history(of_sft.info.run_id, "loss")]
    assert steps == list(range(1, 41)), "no step is lost, and none is reported twice"
