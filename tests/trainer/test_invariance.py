"""Invariant 1: the gradient of step k is a pure function of (job, k), whatever the layout (fp32)."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
from by_hand import adamw, base, train
from finished_runs import Curve, curve, difference
from sampling import SEED, each_sampled

from runfolder.record import load_job

TOLERANCE = 1e-6
STEPS = 20
METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 4}}
RATES = {"full": 1e-3, "lora": 1e-2}
LAYOUTS = list(itertools.product(METHODS, (0, 1, 2, 3), (1, 3), (False, True)))  # method, ZeRO, micro-batch, packed


def reference(run_dir: Path, cache: Path) -> Curve:
    """The same job without DeepSpeed, in plain PEFT."""
    model = base(run_dir)
    if load_job(run_dir).method.kind == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    return train(run_dir, cache, model, adamw(model))


def sample() -> list[Any]:
    """Layouts for `make test`: each ZeRO stage once, each method, micro-batch and packing twice."""
    rng = random.Random(SEED)
    parts = (rng.sample((first, second) * 2, 4) for first, second in (tuple(METHODS), (1, 3), (False, True)))
    chosen = [(method, zero, micro, packed) for zero, (method, micro, packed) in enumerate(zip(*parts, strict=True))]
    return [
        pytest.param([2], chosen, id="sample"),
        pytest.param([1, 2, 4], LAYOUTS, id="all", marks=pytest.mark.matrix),
    ]


@pytest.mark.parametrize(("worlds", "layouts"), sample())
@pytest.mark.timeout(3600)
def test_curves_agree_over_layouts(worlds: list[int], layouts: Any, new_run: Any, launch: Any, cache: Path) -> None:
    expected = {
        name: reference(
            new_run(f"reference-{name}", method=METHODS[name], train={"steps": STEPS, "lr": RATES[name]}), cache
        )
        for name in METHODS
    }
    worst: dict[str, float] = {}
    for world in worlds:
        runs = {
            (name, zero, micro, packed): new_run(
                f"{name}-w{world}-z{zero}-m{micro}-p{int(packed)}",
                method=METHODS[name],
                sharding={"zero": zero},
                train={"steps": STEPS, "micro_batch": micro, "lr": RATES[name]},
                data={"packing": packed},
            )
            for name, zero, micro, packed in layouts
        }
        launch(world, *runs.values())
        worst |= {run.name: difference(curve(run), expected[key[0]]) for key, run in runs.items()}
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < TOLERANCE, {name: d for name, d in worst.items() if d >= TOLERANCE}


@pytest.mark.parametrize(("name", "zero"), each_sampled([("full", 3), ("lora", 2)]))
def test_gradient_checkpointing_changes_nothing(name: str, zero: int, new_run: Any, launch: Any) -> None:
    def run(checkpointing: bool) -> Path:
        train = {"gradient_checkpointing": checkpointing, "lr": RATES[name]}
        made: Path = new_run(f"{name}-{checkpointing}", method=METHODS[name], sharding={"zero": zero}, train=train)
        return made

    runs = [run(True), run(False)]
    launch(2, *runs)
    assert difference(*map(curve, runs)) < TOLERANCE
