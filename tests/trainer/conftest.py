"""What several tests of the trainer learn from."""

import json
import random
import shutil
from pathlib import Path

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
def ending_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with so many tokens that end an answer that what it writes has all lengths."""
    folder = tmp_path_factory.mktemp("ending") / "base"
    shutil.copytree(tiny_base, folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    ends = [config["eos_token_id"], *range(500, 600)]
    path.write_text(json.dumps(config | {"eos_token_id": ends}))
    return folder
