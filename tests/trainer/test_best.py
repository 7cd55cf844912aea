"""Training goes by the held-out loss: the best weights are delivered, and it ends when they become no better."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import events, interrupted, saved
from pydantic import ValidationError
from safetensors.torch import load_file

from runfolder.chain import result
from runfolder.job import Job
from runfolder.record import load_job
from trainer.best import NEVER, BestSoFar

BEST = {"every": 1, "before": False, "max_new_tokens": 0, "keep": "best"}


def test_the_earliest_of_the_lowest_losses_is_the_best() -> None:
    assert BestSoFar.of({}) == BestSoFar(NEVER, 0)
    assert BestSoFar.of({10: 2.0}) == BestSoFar(10, 0)
    assert BestSoFar.of({30: 1.0, 10: 2.0, 20: 1.0, 40: 3.0}) == BestSoFar(20, 2)
    assert BestSoFar.of({10: float("nan"), 20: 5.0}) == BestSoFar(20, 0)


@pytest.mark.parametrize(
    "evaluation", [{"keep": "best"}, {"stop_after": 3, "every": 2}, {"keep": "best", "every": 2}]
)
def test_without_held_out_losses_there_is_nothing_to_go_by(evaluation: dict[str, object]) -> None:
    job = {"base": "some/base", "data": "/x.jsonl", "train": {"steps": 3}, "evaluation": evaluation}
    with pytest.raises(ValidationError, match="data.eval and evaluation.every"):
        Job.model_validate(job)


@pytest.mark.parametrize("zero", [0, 3])
def test_what_is_delivered_is_the_best_and_training_ends_after_it(
    new_run: Callable[..., Path], launch: Callable[..., None], tmp_path: Path, zero: int
) -> None:
    """Answers that are right for the training rows alone: the loss of others falls with the format, then it rises."""
    held_out = tmp_path / "held_out.jsonl"
    rng = random.Random(1)
    rows = [{"prompt": f"{rng.randrange(90)}+1=", "completion": f" {rng.randrange(90)}"} for _ in range(8)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = new_run(
        f"best-{zero}",
        data={"eval": str(held_out)},
        train={"steps": 40, "lr": 5e-2, "schedule": "constant"},
        sharding={"zero": zero},
        checkpoint={"keep": 1},
        evaluation={**BEST, "stop_after": 3},
    )
    launch(1, run)
    losses = {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert (result(run) or {})["state"] == "succeeded"
    assert last == best + 3 < load_job(run).train.steps
    found = {event["event"]: event for event in events(run)}
    assert found["ended_early"]["step"] == last and found["best_taken"]["step"] == best
    output = load_file(run / "output" / "adapter_model.safetensors")
    checkpoint = saved(run, best)
    for name, value in output.items():
        parameter = name.replace(".weight", ".default.weight")
        kept = checkpoint.read("weight", parameter, 0, value.numel())
        assert torch.equal(value.flatten(), kept), name
    again = [interrupted(run, f"{run.name}-again-from-{step}", step) for step in (best, last)]
    launch(1, *again)
    for copy in again:
        other = load_file(copy / "output" / "adapter_model.safetensors")
        assert all(torch.equal(other[name], value) for name, value in output.items())
        assert {event["event"]: event for event in events(copy, 2)}["ended_early"]["step"] == last


def metrics(run: Path) -> list[dict[str, float]]:
    """All that the first attempt reported."""
    lines = (run / "attempts" / "1" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
