"""The support matrix: `make test` takes every method at one stage; `make matrix` all, and writes it down."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import KINDS, LIMITS, METHODS, STAGES, TRAIN, Campaign, assert_output_passed, merges
from finished_runs import curve, difference
from sampling import SEED, sampled

from methods.base import Setup
from methods.registry import create
from orchestrator.describe import CAPABILITIES
from orchestrator.planning.model import locate
from orchestrator.planning.sizes import sizes
from runfolder.job import Base, Job
from trainer import speed
from trainer.base import load_model
from trainer.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
SUPPORT = ROOT / "methods" / "support.json"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kinds", sampled(list(METHODS), 8))
def test_every_method_is_the_same_on_two_workers(kinds: list[str], new_run: Any, launch: Any) -> None:
    rng = random.Random(SEED)

    def run(kind: str, name: str, zero: int, micro: int, packing: bool) -> Path:
        made: Path = new_run(
            f"{kind}-{name}",
            method=METHODS[kind],
            data={"packing": packing},
            train={"micro_batch": micro, **TRAIN[kind]},
            sharding={"zero": zero},
            output={"merge": merges(kind)},
        )
        return made

    alone = {kind: run(kind, "alone", 0, 16, False) for kind in kinds}
    pair = {kind: run(kind, "pair", rng.choice(STAGES), rng.choice((1, 4)), rng.random() < 0.5) for kind in kinds}
    launch(1, *alone.values())
    launch(2, *pair.values())
    worst = {kind: difference(curve(pair[kind], 1), curve(alone[kind], 1)) for kind in kinds}
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < 1e-6
    for kind, made in pair.items():
        assert_output_passed(kind, made)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_trained_is_what_the_plan_says_and_fp32(precision: str, tiny_base: Path) -> None:
    base = locate(Base(model=str(tiny_base)))
    assert base
    for kind, options in METHODS.items():
        train = {"steps": 20, "precision": precision}
        job = Job.model_validate({"base": str(tiny_base), "method": options, "data": {"train": "-"}, "train": train})
        dtype, cpu = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], torch.device("cpu")
        method = create(job.method, Setup(20, 0, 64, load_tokenizer(job.base)))
        model, planned = load_model(job, method, dtype, cpu), sizes(job, base)
        # AdaLoRA has a counter per module on top, which the plan leaves out.
        assert planned and speed.count_weights(model) == pytest.approx(planned.parameters, rel=1e-3), kind
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == job.method.trained_parameters(base.linears, base.other_shapes), kind
        assert {p.dtype for p in trained} == {torch.float32}, kind


@pytest.mark.matrix
@pytest.mark.timeout(6000)
def test_every_cell(new_run: Any, launch: Any, cache: Path, held_out: Path) -> None:
    measured = Campaign(new_run, launch, cache, held_out).measure(
        os.environ.get("MATRIX_METHODS", " ".join(METHODS)).split()
    )
    print(json.dumps(measured, indent=1))
    wrong = {
        f"{kind} at ZeRO {zero}, {name}": cells.get(name)
        for kind, stages in measured.items()
        for zero, cells in stages.items()
        for name in CAPABILITIES
        if name not in KINDS[kind].refusals and not cells.get(name, 1.0) <= LIMITS.get(name, 1e-6)
    }
    record(
        {
            kind: stages
            for kind, stages in measured.items()
            if not any(name.startswith(f"{kind} at") for name in wrong)
        }
    )
    assert not wrong


def record(measured: dict[str, Any]) -> None:
    """Write down the methods of which every cell held, with the commit that it held at."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    found = json.loads(SUPPORT.read_text())
    for kind in measured:
        held = {name: list(STAGES) for name in CAPABILITIES if name not in KINDS[kind].refusals}
        found[kind] = {"commit": commit, "stages": held}
    SUPPORT.write_text(json.dumps({kind: found[kind] for kind in METHODS if kind in found}, indent=1) + "\n")


def test_what_was_seen_is_of_methods_and_capabilities_that_there_are() -> None:
    """A new method is not in it before `make matrix` has run for it, and is shown as not run."""
    for kind, seen in json.loads(SUPPORT.read_text()).items():
        assert kind in KINDS and set(seen["stages"]) == set(CAPABILITIES) - set(KINDS[kind].refusals)
