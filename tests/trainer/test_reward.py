"""Reward models: first losses, curves in every layout, and what plain libraries load and say of padded batches."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from finished_runs import rows

LN_2 = 0.6931471805599453
REWARD = {"kind": "reward"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("scored") / "pairs.jsonl"
    lines = []
    for number in range(60):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(2, 9))]
        right = str(sum(numbers))
        wrong = right[::-1] + str(rng.randrange(10 ** rng.randrange(1, 6)))
        row = {"prompt": " + ".join(map(str, numbers)) + " =", "chosen": f" {right}", "rejected": f" {wrong}"}
        if number % 3:
            row["margin"] = number / 40
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_try(method: str, new_run: Any, launch: Any, pairs: Path) -> None:
    run = new_run("r", objective=REWARD, method={"kind": method}, data={"train": str(pairs), "eval": str(pairs)},
        train={"steps": 4, "batch_tokens": 400, "lr": 1e-3})
    launch(1, run)
    print(rows(run, 1))
    print((run/"attempts/1/metrics.jsonl").read_text())
    print((run/"attempts/1/events.jsonl").read_text())
    assert 0
