"""Runs that train on some cluster: submitted, waited for, and compared with the same job undisturbed."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow_runs import series

import fleetune
from orchestrator.runs import find
from orchestrator.tracking.collect import deliver_all
from orchestrator.tracking.history import history
from runfolder.chain import claim_next
from runfolder.folders import home

ENDED = ("succeeded", "failed", "cancelled")
SECRET = {"WANDB_API_KEY": "kept-from-all-others"}
LONG = {"train": {"steps": 30, "batch_tokens": 128}, "checkpoint": {"every": 5}}


def train_job(folder: Path, base: Path, rows: Path | str, **changes: object) -> Path:
    """A small job of one worker."""
    job = {
        "name": "sums",
        "base": str(base),
        "method": {"kind": "lora", "rank": 2},
        "data": {"train": str(rows), "seq_len": 64},
        "train": {"steps": 12, "batch_tokens": 256},
        "resources": {"workers_per_node": 1},
        "evaluation": {"max_new_tokens": 0},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def wait_for(run_id: str, *states: str, timeout_s: float = 400) -> fleetune.Status:
    """The status of a run, once it is in one of these states; fails where it ends in another one."""
    deadline = time.monotonic() + timeout_s
    while (status := fleetune.status(run_id)).state not in states:
        said = find(run_id).cluster.logs(run_id).text[-3000:]
        assert status.state not in ENDED and time.monotonic() < deadline, f"{status}\n{said}"
        time.sleep(0.2)
    return status


def begin(cluster: str, job: Path, steps: int = 8) -> Path:
    """Submit a run, and wait until it has done so many steps; gives its folder."""
    done = fleetune.submit(job, cluster=cluster)
    while wait_for(done.run_id, "queued", "starting", "running", "preempted").step < steps:
        time.sleep(0.2)
    return done.run_dir


def assert_undisturbed(run_dir: Path, launch: Callable[..., None], timeout_s: float = 600) -> None:
    """Wait for the success of a run, each of whose steps has the loss of the same job undisturbed elsewhere."""
    wait_for(run_dir.name, "succeeded", timeout_s=timeout_s)
    assert (run_dir / "output" / "adapter_model.safetensors").exists()
    alone = run_dir.with_name(f"{run_dir.name}-alone")
    alone.mkdir()
    for name in ("job.yaml", "run.json"):
        shutil.copy(run_dir / name, alone)
    claim_next(alone, None)
    launch(2, alone)
    steps = [row["step"] for row in history(run_dir)]
    assert steps == list(range(1, steps[-1] + 1))
    expected = [row["loss"] for row in history(alone)]
    assert [row["loss"] for row in history(run_dir)] == pytest.approx(expected, rel=1e-5)
    root = run_dir.parents[1]
    assert root == home() or not list(root.glob("*.db"))
    assert deliver_all() == {}
    reported = [(row["step"], row["loss"]) for row in history(run_dir)]
    assert [(step, loss) for step, loss, _ in series(None, run_dir)] == reported
    assert knowing(SECRET["WANDB_API_KEY"]) <= {run_dir / "secrets.json"}, "neither MLflow nor an event has a secret"


def knowing(secret: str) -> set[Path]:
    """The files of the laptop's home, MLflow's store among them, that have a secret."""
    files = [path for path in home().rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files), "MLflow has its store here"
    return {path for path in files if secret.encode() in path.read_bytes()}
