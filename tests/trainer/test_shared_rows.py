"""Rows that two workers share (sharding.sequence: 2) are trained on as one worker does, in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
from campaign import METHODS, TRAIN
from finished_runs import curve, difference


@pytest.mark.parametrize("kinds", [["lora", "full"]])
@pytest.mark.timeout(600)
def test_methods_agree_with_one_worker(kinds: list[str], new_run: Any, launch: Any) -> None:
    def run(kind: str, sequence: int, zero: int) -> Path:
        made: Path = new_run(
            f"{kind}-{sequence}",
            method=METHODS[kind],
            train={"micro_batch": 4, **TRAIN[kind]},
            sharding={"zero": zero, "sequence": sequence},
            resources={"workers_per_node": sequence},
        )
        return made

    alone = {kind: run(kind, 1, 0) for kind in kinds}
    shared = {kind: run(kind, 2, 0) for kind in kinds}
    launch(1, *alone.values())
    launch(2, *shared.values())
    worst = {kind: difference(curve(shared[kind]), curve(alone[kind])) for kind in kinds}
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < 1e-5
