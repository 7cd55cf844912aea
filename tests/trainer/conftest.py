"""What several tests of the trainer learn from."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest


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
        train = {"steps": 20, "batch_tokens": 400, "lr": 1e-3, "micro_batch": 1, **parts.pop("train", {})}
        run: Path = new_run(name, objective=objective, data=data, train=train, **parts)
        return run

    return make


@pytest.fixture(scope="session")
def ending_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with so many tokens that end an answer that what it writes has all lengths."""
    folder = tmp_path_factory.mktemp("ending") / "base"
    shutil.copytree(tiny_base, folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    ends = [config["eos_token_id"], *range(500, 600)]
    path.write_text(json.dumps(config | {"eos_token_id": ends}))
    return folder
