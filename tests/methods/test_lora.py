"""LoRA's options: starts, LoRA+, DoRA's and rsLoRA's variants, against PEFT used alone."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from alone import attached, llama, logits, losses, optimizer_of, trained
from finished_runs import curve, difference, interrupted
from peft.optimizers import create_loraplus_optimizer

from methods.options import Dora, Lora, Options, RsLora
from methods.parts import eva

STARTS = ("default", "gaussian", "orthogonal", "pissa", "olora")


def peft_alone(**options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options)
    return peft.get_peft_model(llama(), config)


def plain(model: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


CASES: list[tuple[Options, dict[str, Any]]] = [
    *((Lora(rank=4, init=start), {"init_lora_weights": True if start == "default" else start}) for start in STARTS),
    (RsLora(rank=4), {"use_rslora": True}),
    (Dora(rank=4), {"use_dora": True}),
    (
        Lora(rank=4, alpha=2, target=("*_proj",), exclude=("mlp.*",)),
        {"lora_alpha": 2, "target_modules": r".*attn\..*_proj"},
    ),
]


@pytest.mark.parametrize(
    ("options", "config"), CASES, ids=lambda x: getattr(x, "init", None) or getattr(x, "kind", "")
)
def test_equals_peft_alone(options: Options, config: dict[str, Any]) -> None:
    method, model = attached(options, llama())
    found = losses(model, optimizer_of(method, model, 1e-2))
    alone = peft_alone(**config)
    assert found == pytest.approx(losses(alone, plain(alone)), rel=1e-5)
    assert found[-2] < found[0] - 0.05


@pytest.mark.parametrize("options", [Lora(rank=4, lr_ratio=8), Dora(rank=4, lr_ratio=8)], ids=lambda x: x.kind)
def test_lora_plus_equals_pefts(options: Options) -> None:
    method, model = attached(options, llama())
    found = losses(model, optimizer_of(method, model, 1e-3))
    alone = peft_alone(use_dora=options.kind == "dora")
    optimizer = create_loraplus_optimizer(alone, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    assert found == pytest.approx(losses(alone, optimizer), rel=1e-5)
    other, same = attached(options.model_copy(update={"lr_ratio": 1.0}), llama())
    assert abs(losses(same, optimizer_of(other, same, 1e-3))[-1] - found[-1]) > 0.1


@pytest.mark.parametrize("options", [options for options, _ in CASES], ids=lambda x: getattr(x, "init", x.kind))
def test_export_fits_the_untouched_base(options: Options, tmp_path: Path) -> None:
    method, model = attached(options, llama())
    at_start = logits(model)
    assert torch.allclose(at_start, logits(llama()), atol=2e-5)
    losses(model, optimizer_of(method, model, 1e-2))
    expected = logits(model)
    method.export(model, trained(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert (logits(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(method.merge(loaded)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("at_once", [10_000, 100])
def test_eva_finds_the_principal_directions_of_the_inputs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "AT_ONCE", at_once)
    method, model = attached(Lora(rank=4, init="eva"), llama())
    examples = [torch.randint(320, (1, n), generator=torch.Generator().manual_seed(n)) for n in range(20, 40)]
    inputs: list[torch.Tensor] = []
    target = "base_model.model.model.layers.1.mlp.down_proj"
    handle = model.get_submodule(target).register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    method.initialise(model, examples)
    handle.remove()
    X = torch.cat(inputs).detach()
    best = torch.linalg.svdvals(X - X.mean(0))[:4].square().sum()
    A = model.get_parameter(f"{target}.lora_A.default.weight").detach()
    assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
    explained = ((X - X.mean(0)) @ A.T).square().sum() / best
    assert explained > (0.99 if at_once > len(X) else 0.95)
    assert torch.allclose(logits(model), logits(llama()), atol=1e-5)


def test_a_start_from_the_base_is_not_sought_again() -> None:
    """Elsewhere, singular vectors may come with the other sign: a resumed run needs those of its first attempt."""
    options = Lora(rank=4, init="pissa")
    first, model = attached(options, llama())
    flipped = {name: -value for name, value in first.state().items()}
    second, _ = attached(options, llama())
    second.load_state(flipped)
    again = second.attach(llama())
    for name, value in trained(again).items():
        assert torch.equal(value, flipped[f"start.{name}"])
    weight = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(again.get_parameter(weight), model.get_parameter(weight))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"init": "orthogonal", "rank": 3}, "even"),
        ({"init": "pissa", "rank": 17, "target": ("k_proj",)}, "16 directions"),
        ({"target": ("no_proj",)}, "no_proj"),
        ({"exclude": ("*",)}, "at least one"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        attached(Lora(**options), llama())


def test_layouts_agree_and_resume_is_exact(new_run: Any, launch: Any) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "pissa": {"kind": "lora", "rank": 4, "init": "pissa", "lr_ratio": 4},
        "eva": {"kind": "lora", "rank": 4, "init": "eva"},
    }
    runs = {
        (kind, zero): new_run(
            f"{kind}-{zero}",
            method=kinds[kind],
            sharding={"zero": zero},
            train={"lr": 2e-3, "micro_batch": 1 + zero},
            data={"packing": zero == 3},
            checkpoint={"every": 10},
        )
        for kind, zero in (("pissa", 0), ("pissa", 3), ("eva", 0), ("eva", 3))
    }
    launch(2, *runs.values())
    worst = {key: difference(curve(run), curve(runs[key[0], 0])) for key, run in runs.items()}
    assert max(worst.values()) < 1e-6, worst
    again = {key: interrupted(runs[key], f"{runs[key].name}-again", 10) for key in (("pissa", 3), ("eva", 0))}
    launch(2, *again.values())
    for key, run in again.items():
        assert curve(run, 2) == curve(runs[key])[10:], key
