"""Every method's output passes the check at the end of its run: plain PEFT and transformers load what was trained."""

from typing import Any

import pytest
from campaign import KINDS, METHODS, TRAIN
from finished_runs import events

from trainer.attempt import last
from trainer.missing import missing

VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "embedding": {"kind": "lora", "rank": 4, "target": ["embed_tokens", "q_proj"]},
    "quantised relora": {"kind": "relora", "rank": 4, "quantised": True},
}
STAGES = {"fp32": (0, 3), "bf16": (1, 2)}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.matrix)])
def test_every_method_passes(new_run: Any, launch: Any, precision: str) -> None:
    runs = {
        name: new_run(
            name,
            method=method,
            train={"steps": 3, "precision": precision, **TRAIN[method["kind"]]},
            sharding={"zero": STAGES[precision][number % 2]},
            output={"merge": "merge" not in KINDS[method["kind"]].refusals},
        )
        for number, (name, method) in enumerate({**METHODS, **VARIANTS}.items())
    }
    launch(2, *runs.values())
    for name, run in runs.items():
        options = KINDS[{**METHODS, **VARIANTS}[name]["kind"]]
        compared = [event for event in events(run) if event["event"] == "compared"]
        merges = not options.makes_model and "merge" not in options.refusals
        assert len(compared) == (2 if merges else 1), name
        assert all(event["gap"] <= event["allowed"] for event in compared), (name, compared)
        assert missing(last(run)) == [], name
