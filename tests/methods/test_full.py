"""Full fine-tuning with frozen weights, and LISA against AdamW over the drawn layers alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import adamw, base, train
from finished_runs import curve, difference, interrupted, loss_gap
from safetensors.torch import load_file
from sampling import method_sampled
from transformers import AutoModelForCausalLM

from methods.base import Setup
from methods.full import FullTuning
from methods.options.full import Full, layer_of
from trainer.checkpoint.reading import CheckpointReader

LISA = {
    "kind": "full",
    "lisa_layers": 1,
    "lisa_every": 3,
    "freeze": ["*embed_tokens*", "layers.*.mlp.up_proj.weight"],
}
TRAIN = {"steps": 20, "lr": 1e-3, "weight_decay": 0.1, "micro_batch": 2}


def by_hand(run_dir: Path, cache: Path) -> Any:
    """The same job: waiting layers have no gradient and lose their state."""
    model = base(run_dir)
    method = FullTuning(Full.model_validate(LISA), Setup(20))
    method.attach(model)
    optimizer = adamw(model, weight_decay=0.1)

    def before(k: int) -> None:
        active = method.drawn(k)
        for name, parameter in model.named_parameters():
            if layer_of(name) is not None and layer_of(name) not in active:
                parameter.grad = None
                optimizer.state.pop(parameter, None)

    return train(run_dir, cache, model, optimizer, before=before), method


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stages", method_sampled("full", [0, 2, 3]))
def test_lisa_at_every_layout(stages: list[int], new_run: Any, launch: Any, cache: Path, held_out: Path) -> None:
    parts: dict[str, Any] = {
        "method": LISA,
        "train": TRAIN,
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
        "checkpoint": {"every": 5, "keep": 9},
    }
    runs = [new_run(f"zero{zero}", sharding={"zero": zero}, **parts) for zero in stages]
    launch(2, *runs)
    expected, method = by_hand(runs[0], cache)
    draws = [method.drawn(k) for k in range(20)]
    assert {1, 0} == set().union(*draws) and any(a != b for a, b in pairwise(draws))
    worst = {run.name: difference(curve(run), expected) for run in runs}
    print(worst)
    assert max(worst.values()) < 1e-6
    reader = CheckpointReader(runs[-1] / "attempts" / "1" / "checkpoints" / "step-20")
    state = {layer: reader.kinds(f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 1)}
    assert all(bool(kinds) == (layer in draws[19]) for layer, kinds in state.items())
    again = [interrupted(run, f"{run.name}-again", 10) for run in runs]
    other = interrupted(runs[-1], "other", 10, sharding={"zero": 1})
    launch(2, *again, other)
    for run, whole in zip(again, runs, strict=True):
        assert curve(run, 2) == curve(whole)[10:]
    assert difference(curve(other, 2), curve(runs[-1])[10:]) < 1e-5
    untuned = base(runs[0]).state_dict()
    for run in runs:
        output = load_file(run / "output" / "model.safetensors")
        assert output.keys() >= {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
        for name, value in output.items():
            frozen = "embed_tokens" in name or "up_proj" in name
            assert torch.equal(value, untuned[name]) == frozen, name
        assert loss_gap(AutoModelForCausalLM.from_pretrained(run / "output"), run, cache) < 1e-5


def test_bad_options_say_what_is_allowed() -> None:
    linears = {f"model.layers.{i}.mlp.up_proj": (8, 8) for i in range(3)}
    others = {"model.embed_tokens.weight": (10, 8)}
    assert Full(freeze=("layers.[01].*",)).trained_parameters(linears, others) == 64 + 80
    for options, said in (
        (Full(lisa_layers=4), "allowed: up to the base's 3 layers"),
        (Full(freeze=("*wte*",)), "no weight of the base matches"),
        (Full(freeze=("*",)), "match every weight"),
    ):
        with pytest.raises(ValueError, match=said):
            options.trained_parameters(linears, others)
