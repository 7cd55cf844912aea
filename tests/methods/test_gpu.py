"""Every method on GPUs, through NCCL: `make gpu`, where there are two of them."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import METHODS, TRAIN
from finished_runs import Curve, curve, difference, interrupted, rows

STEPS = 20
LIMITS = {"fp32": 1e-6, "bf16": 5e-3}  # of losses; of gradient norms too in fp32
GALORE, RELORA = METHODS["galore"], METHODS["relora"]
VARIANTS: dict[str, dict[str, Any]] = METHODS | {
    "galore-8bit": GALORE | {"optimizer": "adamw8bit"},
    "galore-fast": GALORE | {"refresh": "fast"},
    "q-galore": GALORE | {"variant": "q-galore"},
    "apollo": GALORE | {"variant": "apollo"},
    "relora-full-rank": RELORA | {"full_rank": 0.3},
    "relora-4-bit": RELORA | {"quantised": True, "keep": 0.1},
    "lisa": {"kind": "full", "lisa_layers": 1, "lisa_every": 4},
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_gpus_train_as_one(variant: str, precision: str, new_run: Any, launch: Any) -> None:
    assert torch.cuda.device_count() > 1, "two GPUs are needed"
    method = VARIANTS[variant]

    def run(name: str, zero: int, micro: int, packing: bool) -> Path:
        made: Path = new_run(
            name,
            method=method,
            data={"packing": packing},
            train={"steps": STEPS, "micro_batch": micro, "precision": precision, **TRAIN[method["kind"]]},
            sharding={"zero": zero},
            checkpoint={"every": STEPS // 2, "keep": 9},
        )
        return made

    alone, packed = run("alone", 0, 16, False), run("packed", 3, 4, True)
    pairs = {zero: run(f"pair-{zero}", zero, 4, False) for zero in range(4)}
    launch(1, alone)
    launch(2, *pairs.values(), packed)
    again = interrupted(pairs[3], "again", STEPS // 2)
    other = interrupted(pairs[3], "other", STEPS // 2, sharding={"zero": 2})
    launch(2, again)
    launch(1, other)

    def apart(a: Curve, b: Curve) -> float:
        exact = precision == "fp32"
        return difference(a, b) if exact else difference(losses(a), losses(b))

    truth, whole = curve(alone), curve(pairs[3])[STEPS // 2 :]
    found = {str(zero): apart(curve(pair), truth) for zero, pair in pairs.items()}
    found |= {"packed": apart(curve(packed), truth), "other": apart(curve(other, 2), whole)}
    resumed = difference(curve(again, 2), whole)
    print(f"{variant} in {precision}: {found}, resumed {resumed}")
    rates = [row["tokens_per_second"] for row in rows(pairs[0], 1).values()][3:]
    assert max(rates) < 10 * statistics.median(rates), "also of the step before a save, which is read at once"
    assert max(found.values()) < LIMITS[precision]
    assert resumed == 0


def losses(found: Curve) -> Curve:
    """A curve whose norms are those of any other."""
    return [(loss, 1.0) for loss, _ in found]
