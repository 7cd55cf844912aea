"""Every method on the fast path, compiled, on one GPU: it computes what the plain path does, and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import METHODS, TRAIN
from finished_runs import curve, difference, events, interrupted

STEPS = 6
LIMITS = {"fp32": 1e-5, "bf16": 5e-3}  # of losses; of gradient norms too in fp32
CASES = [(kind, precision, 0) for kind in METHODS for precision in LIMITS]
CASES += [(kind, "bf16", zero) for kind in ("lora", "full") for zero in (1, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "precision", "zero"), CASES)
def test_fast_is_plain(kind: str, precision: str, zero: int, new_run: Any, launch: Any) -> None:
    assert torch.cuda.is_available(), "a GPU is needed"

    def run(kernels: str) -> Path:
        made: Path = new_run(
            kernels,
            method=METHODS[kind],
            train={"steps": STEPS, "micro_batch": 4, "precision": precision, "kernels": kernels, **TRAIN[kind]},
            sharding={"zero": zero},
            checkpoint={"every": STEPS // 2, "keep": 9},
        )
        return made

    plain, whole = run("plain"), run("fast")
    launch(1, plain, whole)
    (plan,) = (event for event in events(whole) if event["event"] == "plan")
    print(kind, precision, zero, plan["kernels"], plan["kernel_problems"])
    assert plan["kernels"]
    found, expected = curve(whole), curve(plain)
    if precision == "bf16":
        found = [(loss, 1.0) for loss, _ in found]
        expected = [(loss, 1.0) for loss, _ in expected]
    assert difference(found, expected) < LIMITS[precision]
    again = interrupted(whole, "again", STEPS // 2)
    launch(1, again)
    resumed = difference(curve(again, 2), curve(whole)[STEPS // 2 :])
    # Dense attention, which methods with an attention of their own and fp32 keep, may add in any order.
    assert resumed == 0 if "attention within documents" in plan["kernels"] else resumed < 1e-6
