"""The support matrix: `make test` takes every method at one stage; `make matrix` all, and writes it down."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import KINDS, LIMITS, METHODS, STAGES, TRAIN, Campaign, curve, difference

from methods.base import Setup
from methods.registry import create
from orchestrator.describe import CAPABILITIES, support_table
from orchestrator.job import Base, Job
from orchestrator.model import locate
from trainer.base import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent.parent
SUPPORT, README = ROOT / "methods" / "support.json", ROOT / "README.md"
BEGIN, END = "<!-- support: written by make matrix -->", "<!-- end of support -->"


@pytest.fixture
def held_out(sums: Path, tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text("\n".join(sums.read_text().splitlines()[:20]))
    return path


@pytest.mark.timeout(600)
def test_every_method_is_the_same_on_two_workers(new_run: Any, launch: Any) -> None:
    rng = random.Random(int(os.environ.get("MATRIX_SEED", "0")))

    def run(kind: str, name: str, zero: int, micro: int, packing: bool) -> Path:
        made: Path = new_run(
            f"{kind}-{name}",
            method=METHODS[kind],
            data={"packing": packing},
            train={"micro_batch": micro, **TRAIN[kind]},
            sharding={"zero": zero},
        )
        return made

    alone = {kind: run(kind, "alone", 0, 16, False) for kind in METHODS}
    pair = {kind: run(kind, "pair", rng.choice(STAGES), rng.choice((1, 4)), rng.random() < 0.5) for kind in METHODS}
    assert launch(1, *alone.values(), timeout=300) == [0]
    assert launch(2, *pair.values(), timeout=300) == [0, 0]
    worst = {kind: difference(curve(pair[kind], 1), curve(alone[kind], 1)) for kind in METHODS}
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_trained_is_what_the_plan_says_and_fp32(precision: str, tiny_base: Path) -> None:
    base = locate(Base(model=str(tiny_base)))
    assert base
    for kind, options in METHODS.items():
        train = {"steps": 20, "precision": precision}
        job = Job.model_validate({"base": str(tiny_base), "method": options, "data": {"train": "-"}, "train": train})
        dtype, cpu = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], torch.device("cpu")
        method = create(job.method, Setup(20, 0, 64, load_tokenizer(job.base)))
        trained = [p for p in load_model(job, method, dtype, cpu).parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == job.method.trained(base.linears, base.others), kind
        assert {p.dtype for p in trained} == {torch.float32}, kind


@pytest.mark.matrix
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", METHODS)
def test_every_cell(kind: str, new_run: Any, launch: Any, cache: Path, held_out: Path) -> None:
    measured = Campaign(kind, new_run, launch, cache, held_out, steps=20).measure(STAGES)
    print(json.dumps(measured, indent=1))
    for zero, cells in measured.items():
        assert not set(CAPABILITIES) - cells.keys() - KINDS[kind].refusals.keys()
        wrong = {name: value for name, value in cells.items() if not value <= LIMITS.get(name, 1e-6)}
        assert not wrong, f"{kind} at ZeRO {zero}"
    record(kind, measured)


def record(kind: str, measured: dict[int, dict[str, float]]) -> None:
    """Keep what held, with the commit that it held at."""
    found = json.loads(SUPPORT.read_text()) if SUPPORT.exists() else {}
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    said = subprocess.run(describe, capture_output=True, text=True)
    found[kind] = {
        "commit": said.stdout.strip() or "unknown",
        "stages": {
            name: [zero for zero, cells in measured.items() if name in cells]
            for name in CAPABILITIES
            if name not in KINDS[kind].refusals
        },
    }
    SUPPORT.write_text(json.dumps({name: found[name] for name in METHODS if name in found}, indent=1) + "\n")
    README.write_text(written(README.read_text()))


def written(readme: str) -> str:
    """The README with the table of now."""
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return f"{before}{BEGIN}\n{support_table()}\n{END}{after}"


def test_the_readme_carries_the_table() -> None:
    assert set(json.loads(SUPPORT.read_text())) == set(METHODS)
    assert written(README.read_text()) == README.read_text()
