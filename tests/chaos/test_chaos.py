"""One job that is killed again and again ends as if nobody had touched it. CHAOS_SEED=n chooses other kills.

In `make test`, tests/clusters/contract.py kills a worker, and test_fencing.py has trainers that wake.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from killer import Kill, Killer, plan
from scene import REPORTED, delivered, inhabitants, mlflow_run, reported, until

from clusters.local import Local
from orchestrator.submit import submit
from orchestrator.tracking.store import resolve
from runfolder.appended import read_lines
from runfolder.chain import attempts, result
from runfolder.delivered import is_delivered

SEED = int(os.environ.get("CHAOS_SEED", "0"))
# Stage 3 takes many small messages for a step, so fewer and smaller ones last as long.
STEPS_PER_KILL, BATCH_TOKENS = {2: 30, 3: 20}, {2: 512, 3: 128}
REST_S = 7200.0  # for the steps that are left after the last kill, on a busy machine too


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("kills", "zero"),
    [
        pytest.param(50, 2, id="zero2"),
        pytest.param(50, 3, id="zero3"),
    ],
)
def test_kills_change_nothing(
    kills: int, zero: int, cluster: Local, new_run: Any, launch: Callable[..., Any]
) -> None:
    steps = (kills + 1) * STEPS_PER_KILL[zero]
    undisturbed = new_run(
        "undisturbed",
        method={"kind": "lora", "rank": 4, "dropout": 0.1},
        train={
            "steps": steps,
            "batch_tokens": BATCH_TOKENS[zero],
            "micro_batch": 1,
            "lr": 1e-2,
            "precision": "fp32",
        },
        sharding={"zero": zero},
        checkpoint={"every": 3},
        resources={"workers_per_node": 2},
    )
    run_dir = submit(yaml.safe_load((undisturbed / "job.yaml").read_text())["job"]).run_dir
    rng = random.Random(SEED)
    killer = Killer(cluster, run_dir, rng)
    for number, kill in enumerate(plan(rng, kills, 10), 1):
        print(f"kill {number}/{kills}: {killer.strike(kill)}", flush=True)
    ended = until(lambda: result(run_dir), REST_S)
    assert ended["state"] == "succeeded"
    print("one more: " + killer.strike(Kill("controller", "delivery", 0)), flush=True)
    until(lambda: is_delivered(run_dir))
    cluster.stop()
    assert inhabitants(cluster.home) == []
    assert len(list(run_dir.glob("attempts/*/checkpoints/*"))) == 2  # checkpoint.keep; no torn ones

    launch(2, undisturbed, timeout=REST_S)
    assert_same(undisturbed, run_dir)
    uri = resolve(None)
    assert mlflow_run(uri, run_dir).info.status == "FINISHED"
    for key in REPORTED:
        assert delivered(uri, run_dir, key) == reported(undisturbed, key)
    assert [step for step, _ in delivered(uri, run_dir)] == list(range(1, steps + 1))


def assert_same(undisturbed: Path, run_dir: Path) -> None:
    """The same adapter bit for bit, and no step, also when it was done again, with another loss."""
    file = Path("output", "adapter_model.safetensors")
    assert (run_dir / file).read_bytes() == (undisturbed / file).read_bytes()
    losses = dict(reported(undisturbed))
    for attempt in attempts(run_dir):
        for row in read_lines(attempt, "metrics.jsonl"):
            assert row["loss"] == losses[row["step"]], f"step {row['step']} of attempt {attempt.number}"
