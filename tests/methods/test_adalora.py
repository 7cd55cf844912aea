"""AdaLoRA: PEFT's numbers through all its phases, at every layout, across a kill, and in plain PEFT afterwards."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pytest
import torch
from by_hand import adamw, base, train
from finished_runs import curve, difference, interrupted, loss_gap
from safetensors.torch import load_file
from sampling import method_sampled
from torch import nn
from transformers import AutoModelForCausalLM

from methods.parts.orthogonality import Orthogonality
from methods.parts.peft_adapter import ADAPTER
from methods.parts.ranks import largest, rounded

METHOD = {"kind": "adalora", "rank": 2, "initial_rank": 4, "every": 4, "warmup": 0.1, "final": 0.3}
TRAIN = {"steps": 32, "lr": 1e-2, "micro_batch": 2}  # cuts at 4, 8, ..., 20 and 22; the choice is fixed from then on


def by_peft(run_dir: Path, cache: Path) -> tuple[Any, Any]:
    """The same job with PEFT's own term and allocator."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=32, target_modules="all-linear", tinit=3, tfinal=10, deltaT=4, total_step=32
    )
    model = peft.get_peft_model(base(run_dir), config)
    factors = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]

    def term() -> torch.Tensor:
        grams = [p @ p.T if p.shape[0] == 4 else p.T @ p for p in factors]
        return 0.5 / len(grams) * torch.stack([torch.norm(gram - torch.eye(4), p="fro") for gram in grams]).sum()

    allocate = model.base_model.update_and_allocate
    return train(run_dir, cache, model, adamw(model), term=term, after=lambda k: allocate(k + 1)), model


class Held(NamedTuple):
    """A fragment that is a whole factor, with a gradient of its own."""

    name: str
    start: int
    stop: int
    parameter: nn.Parameter


def gradients_of_terms(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What half the sum of the factors' terms adds to their gradients, doubled."""
    held = []
    for name, factor in factors.items():
        parameter = nn.Parameter(factor.reshape(-1))
        parameter.grad = torch.zeros_like(parameter)
        held.append(Held(name, 0, factor.numel(), parameter))
    view: Any = SimpleNamespace(fragments=lambda: held, replicated=True, shape=lambda name: factors[name].shape)
    Orthogonality(view, list(factors)).add_gradients(0.5, torch.device("cpu"))
    return {part.name: 2 * part.parameter.grad.view(factors[part.name].shape) for part in held}


def test_term_is_peft_s() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_A": (4, 9), "k.lora_A": (4, 9), "v.lora_A": (4, 6), "q.lora_B": (9, 4), "k.lora_B": (9, 4)}
    factors = {
        f"{name}.{ADAPTER}": torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }
    for name, factor in factors.items():
        gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
        torch.norm(gram - torch.eye(4), p="fro").backward()
    found = gradients_of_terms({name: factor.detach() for name, factor in factors.items()})
    for name, factor in factors.items():
        torch.testing.assert_close(found[name], factor.grad)
    (at_its_least,) = gradients_of_terms({f"q.lora_A.{ADAPTER}": torch.eye(4, 9)}).values()
    assert not at_its_least.any()


def test_ties_go_by_position_and_rounding_hides_noise() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0 + 2e-7, 0.0]])
    assert largest(scores, 2).tolist() == [[True, False, True], [False, False, False]]
    assert largest(scores, 4).tolist() == [[True, False, True], [True, True, False]]
    assert not largest(scores, 0).any() and largest(scores, 6).all()
    small = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-40
    assert ((rounded(small) - small).abs() <= small * 2**-13).all()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stages", method_sampled("adalora", [(0, 18), (2, 6), (3, 24)]))
def test_layouts_resume_and_export(
    stages: list[tuple[int, int]], new_run: Any, launch: Any, cache: Path, held_out: Path
) -> None:
    """At a ZeRO stage, and resumed after a step: in the course of the cuts, before and after them."""
    parts: dict[str, Any] = {
        "method": METHOD,
        "train": TRAIN,
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
        "output": {"merge": True},
        "checkpoint": {"every": 6, "keep": 9},
    }
    runs = [new_run(f"zero{zero}", sharding={"zero": zero}, **parts) for zero, _ in stages]
    launch(2, *runs)
    expected, by_hand = by_peft(runs[0], cache)
    worst = {run.name: difference(curve(run), expected) for run in runs}
    print(worst)
    assert max(worst.values()) < 1e-6
    again = [interrupted(run, f"{run.name}-{step}", step) for run, (_, step) in zip(runs, stages, strict=True)]
    other = interrupted(runs[-1], "other", 12, sharding={"zero": 1})
    launch(2, *again, other)
    for run in again:
        whole = run.with_name(run.name.rpartition("-")[0])
        done = 32 - len(curve(run, 2))
        assert curve(run, 2) == curve(whole)[done:]
        one, two = (load_file(r / "output" / "adapter_model.safetensors") for r in (run, whole))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert difference(curve(other, 2), curve(runs[-1])[12:]) < 1e-5
    for run in runs:
        loaded = peft.PeftModel.from_pretrained(base(run), run / "output")
        pattern = loaded.peft_config["default"].rank_pattern
        theirs = by_hand.peft_config["default"].rank_pattern
        assert {k.replace(".default", ""): v for k, v in theirs.items()} == pattern
        assert sum(map(sum, pattern.values())) == 2 * len(pattern) and len({sum(v) for v in pattern.values()}) > 1
        for model in (loaded, AutoModelForCausalLM.from_pretrained(run / "output" / "merged")):
            assert loss_gap(model, run, cache) < 1e-5
