"""IA3, VeRA and FourierFT: equal to PEFT used alone, and what they export is what they trained."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from alone import attached, llama, logits, losses, optimizer_of, trained
from finished_runs import curve, difference, interrupted

from methods.options import Options
from methods.options.other_adapters import FourierFt, Ia3, Vera

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Options, peft.PeftConfig, float]] = {
    "ia3": (Ia3(), peft.IA3Config(target_modules=list(Ia3().target), feedforward_modules=["down_proj"]), 5e-2),
    "vera": (
        Vera(rank=8, projection_seed=3),
        peft.VeraConfig(r=8, projection_prng_key=3, target_modules=LINEARS, d_initial=0.1),
        1e-1,
    ),
    "fourierft": (
        FourierFt(frequencies=50, location_seed=5),
        peft.FourierFTConfig(
            n_frequency=50, scaling=150.0, random_loc_seed=5, init_weights=True, target_modules=LINEARS
        ),
        1e-2,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_equals_peft_alone(kind: str) -> None:
    options, config, lr = CASES[kind]
    method, model = attached(options, llama())
    alone = peft.get_peft_model(llama(), config)
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    curve = losses(model, optimizer_of(method, model, lr))
    assert curve == pytest.approx(losses(alone, optimizer), rel=1e-5)
    assert curve[-2] < curve[0] - 0.05, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("kind", CASES)
def test_plain_peft_loads_and_merges_what_was_trained(kind: str, tmp_path: Path) -> None:
    options, _, lr = CASES[kind]
    method, model = attached(options, llama())
    losses(model, optimizer_of(method, model, lr))
    method.export(model, trained(model), tmp_path)
    expected = logits(model)
    assert (logits(llama()) - expected).abs().max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    merged = logits(method.merge(loaded))
    assert (merged - expected).abs().max() < 1e-5 * expected.abs().max()


def test_patterns_and_exclusions_choose_the_modules() -> None:
    options = Vera(rank=4, target=("layers.1.*_proj",), exclude=("mlp.*",))
    _, model = attached(options, llama())
    names = {name.split(".vera_")[0].removeprefix("base_model.model.") for name in trained(model)}
    assert names == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}


def test_projections_come_from_their_seed_alone() -> None:
    def projection(seed: int, state: int) -> torch.Tensor:
        base = llama()
        torch.manual_seed(state)
        return attached(Vera(rank=4, projection_seed=seed), base)[1].get_buffer("base_model.vera_A.default")

    assert torch.equal(projection(7, 1), projection(7, 2))
    assert not torch.equal(projection(7, 1), projection(8, 1))


def test_ia3_has_no_decay() -> None:
    method, model = attached(Ia3(), llama())
    optimizer = optimizer_of(method, model, 1e-3, weight_decay=0.1)
    assert all(group["weight_decay"] == 0.0 for group in optimizer.param_groups)


@pytest.mark.matrix
def test_layouts_agree(new_run: Any, launch: Any) -> None:
    runs = {
        (kind, zero): new_run(
            f"{kind}-{zero}",
            method=CASES[kind][0].model_dump(),
            sharding={"zero": zero},
            train={"lr": CASES[kind][2] / 5, "micro_batch": 1 + zero},
            data={"packing": zero == 3},
        )
        for kind in CASES
        for zero in (0, 2, 3)
    }
    launch(2, *runs.values())
    worst = {key: difference(curve(run), curve(runs[key[0], 0])) for key, run in runs.items()}
    assert max(worst.values()) < 1e-6, worst


def test_a_worker_may_hold_nothing(new_run: Any, launch: Any) -> None:
    """At ZeRO 3 the first worker holds the only trained number of each module."""
    job: dict[str, Any] = {"method": {"kind": "fourierft", "frequencies": 1}, "checkpoint": {"every": 5, "keep": 9}}
    alone, pair = new_run("alone", **job), new_run("pair", sharding={"zero": 3}, **job)
    launch(1, alone)
    launch(2, pair)
    again = interrupted(pair, "again", 5)
    launch(2, again)
    assert difference(curve(pair), curve(alone)) < 1e-6
    assert curve(again, 2) == curve(pair)[5:]
