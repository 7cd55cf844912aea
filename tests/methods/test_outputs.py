"""The check of an output at the end of a run: every method passes it, and what is not the trained model does not."""

from typing import Any

import pytest
from campaign import KINDS, METHODS, TRAIN
from finished_runs import events

from trainer.attempt import attempts
from trainer.missing import missing

VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "quantised relora": {"kind": "relora", "rank": 4, "quantised": True},
    "embedding": {"kind": "lora", "rank": 4, "target": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_passes_the_check(new_run: Any, launch: Any, precision: str) -> None:
    runs = {
        name: new_run(
            name,
            method=method,
            train={"steps": 3, "precision": precision, **TRAIN.get(method["kind"], {})},
            sharding={"zero": (0, 3)[number % 2] if precision == "fp32" else (1, 2)[number % 2]},
            output={"merge": "merge" not in KINDS[method["kind"]].refusals},
        )
        for number, (name, method) in enumerate({**METHODS, **VARIANTS}.items())
    }
    launch(2, *runs.values())
    for name, run in runs.items():
        compared = [event for event in events(run) if event["event"] == "compared"]
        print(
            precision,
            name,
            [(f"{event['gap']:.2g}", f"{event['allowed']:.2g}") for event in compared],
            [missing(attempt) for attempt in attempts(run)],
        )
    for name, run in runs.items():
        assert not any(missing(attempt) for attempt in attempts(run)), name
