"""Objectives on preferences: first losses that are known, the same curve in every layout, and one reference."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import adamw, base
from finished_runs import Curve, curve, difference, events, interrupted, rows
from sampling import each_sampled, sampled
from torch.nn.functional import cross_entropy, logsigmoid

from methods.base import Setup
from methods.registry import create
from runfolder.record import load_job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import Document, tokenise
from trainer.schedule import learning_rate

STEPS, HALF = 6, 3
LN_2 = 0.6931471805599453
DPO = {"kind": "dpo", "beta": 0.1}
FIRST: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": (DPO, LN_2),
    "smoothed": (DPO | {"label_smoothing": 0.2}, LN_2),
    "per-token": (DPO | {"per_token": True}, LN_2),
    "ipo": (DPO | {"loss": "ipo"}, 25.0),
    "ipo-summed": (DPO | {"loss": "ipo", "beta": 0.5, "per_token": False}, 1.0),
    "hinge": (DPO | {"loss": "hinge"}, 1.0),
    "kto": ({"kind": "kto", "desirable": 1.5, "undesirable": 1.5}, 0.75),
}
PISSA = {"kind": "lora", "rank": 4, "init": "pissa"}
METHODS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "dora", "rank": 4},
    "pissa": PISSA,
    "prefix": {"kind": "prefix", "tokens": 3},
    "galore": {"kind": "galore", "rank": 4},
}
LAYOUTS = [(1, 0, 3, True), (2, 2, 1, True), (2, 3, 1, False), (3, 1, 2, True)]  # workers, ZeRO, micro-batch, packed


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 sums with a right and a wrong answer, of different lengths."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for _ in range(60):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(2, 9))]
        right = str(sum(numbers))
        wrong = right[::-1] + str(rng.randrange(10 ** rng.randrange(1, 6)))
        row = {"prompt": " + ".join(map(str, numbers)) + " =", "chosen": f" {right}", "rejected": f" {wrong}"}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def judged(pairs: Path) -> Path:
    """A .jsonl of the same sums, each with one answer that was judged."""
    path = pairs.with_name("judged.jsonl")
    lines = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        row = json.loads(line)
        liked = number % 3 > 0
        row = {"prompt": row["prompt"], "completion": row["chosen" if liked else "rejected"], "label": liked}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def preference_run(new_run: Any, pairs: Path, judged: Path) -> Any:
    """Make the folder of a run on pairs, or on judged answers for KTO; parts are as in `new_run`."""

    def make(name: str, objective: dict[str, Any], **parts: Any) -> Path:
        data = {"train": str(judged if objective["kind"] == "kto" else pairs), **parts.pop("data", {})}
        train = {"steps": STEPS, "batch_tokens": 400, "lr": 1e-3, "micro_batch": 1, **parts.pop("train", {})}
        run: Path = new_run(name, objective=objective, data=data, train=train, **parts)
        return run

    return make


@pytest.mark.parametrize("cases", sampled([(name, method) for name in FIRST for method in METHODS], 3))
def test_first_losses_are_known(cases: list[Any], preference_run: Any, launch: Any) -> None:
    runs = {case: preference_run("-".join(case), FIRST[case[0]][0], method=METHODS[case[1]]) for case in cases}
    launch(2, *runs.values())
    for (name, method), run in runs.items():
        assert rows(run, 1)[1]["loss"] == pytest.approx(FIRST[name][1], abs=1e-6), (name, method)
        assert rows(run, 1)[2]["loss"] != rows(run, 1)[1]["loss"]
