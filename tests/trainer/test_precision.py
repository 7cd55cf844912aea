"""bf16: the forward pass computes in it, the losses stay near those of fp32, and resume crosses layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from sampling import sampled

METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 4}}
RATES = {"full": 1e-3, "lora": 1e-2}


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "attempts" / "1" / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("stages", sampled([0, 1, 2, 3]))
@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_near_fp32_at_every_stage(method: str, stages: list[int], new_run: Any, launch: Any) -> None:
    def run(name: str, zero: int, precision: str) -> Path:
        train = {"precision": precision, "lr": RATES[method], "steps": 8, "micro_batch": 1}
        made: Path = new_run(name, method=METHODS[method], sharding={"zero": zero}, train=train)
        return made

    exact = run("fp32", 0, "fp32")
    rounded = [run(f"bf16-z{zero}", zero, "bf16") for zero in stages]
    launch(2, exact, *rounded)
    expected = losses(exact)
    for each in rounded:
        found = losses(each)
        assert len(found) == 8
        # Nearer than bf16 can be would mean that something computed in fp32 all the same.
        assert 1e-6 < max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < 5e-3
