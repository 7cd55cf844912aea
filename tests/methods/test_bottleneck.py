"""Bottleneck adapters: equal to the papers' equations, the identity at the start, over layouts and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import base
from finished_runs import curve, difference, interrupted, loss_gap
from sampling import method_sampled
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from methods.base import Setup
from methods.bottleneck import WithBottleneck, load
from methods.options.other_adapters import Bottleneck
from methods.registry import create

SIZE = 5
IDS = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(1))


def attached(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    method = create(Bottleneck(size=SIZE, **options), Setup())
    return method.attach(AutoModelForCausalLM.from_pretrained(folder))


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def transcribed(
    model: Any, weights: dict[str, torch.Tensor], placement: str, f: Any, ids: torch.Tensor
) -> torch.Tensor:
    """Logits of a plain Llama whose layers are written out: s <- s + A(sublayer(norm(s))), A(h) = h + U f(D h)."""

    def adapted(h: torch.Tensor, place: str) -> torch.Tensor:
        if f"{place}.up.weight" not in weights:
            return h
        down, up = (weights[f"{place}.{part}.weight"] for part in ("down", "up"))
        return h + f(h @ down.T + weights[f"{place}.down.bias"]) @ up.T + weights[f"{place}.up.bias"]

    inner = model.model
    s = inner.embed_tokens(ids[None])
    angles = inner.rotary_emb(s, torch.arange(len(ids))[None])
    for i, layer in enumerate(inner.layers):
        h, _ = layer.self_attn(layer.input_layernorm(s), position_embeddings=angles, attention_mask=None)
        s = s + adapted(h, f"model.layers.{i}.self_attn.o_proj")
        s = s + adapted(layer.mlp(layer.post_attention_layernorm(s)), f"model.layers.{i}.mlp.down_proj")
    places = {name.rpartition(".")[0].rpartition(".")[0] for name in weights}
    assert len(places) == {"houlsby": 2, "pfeiffer": 1}[placement] * len(inner.layers)
    return model.lm_head(inner.norm(s))[0]


@pytest.mark.parametrize(
    ("placement", "activation"), [("houlsby", "gelu"), ("pfeiffer", "relu"), ("houlsby", "silu")]
)
def test_twenty_steps_equal_the_equations(placement: str, activation: str, tiny_base: Path) -> None:
    model = attached(tiny_base, placement=placement, activation=activation)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    twins = {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}
    ours, theirs = (torch.optim.AdamW(list(p.values()), lr=1e-2) for p in (trained(model), twins))
    f = getattr(nn.functional, activation)
    for step in range(20):
        document = IDS[step : step + 15]
        said = model(document[None]).logits[0], transcribed(plain, twins, placement, f, document)
        mine, other = (cross_entropy(logits[:-1], document[1:]) for logits in said)
        assert abs(mine.item() - other.item()) / other.item() < 1e-5
        for loss, optimizer in ((mine, ours), (other, theirs)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert any((p != 0).any() for name, p in trained(model).items() if "up" in name)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_starts_as_the_base_and_counts_what_it_adds(placement: str, tiny_base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = plain(IDS[None]).logits
    linears = {n: (m.out_features, m.in_features) for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    model = attached(tiny_base, placement=placement)
    assert torch.equal(model(IDS[None]).logits, expected)
    count = sum(p.numel() for p in trained(model).values())
    assert count == Bottleneck(size=SIZE, placement=placement).added_parameters(linears, {})
    downs = [m.down.weight for m in model.modules() if isinstance(m, WithBottleneck)]
    starts = torch.cat([d.flatten() for d in downs])
    assert starts.std().item() == pytest.approx((2 / downs[0].shape[1]) ** 0.5, rel=0.2)


def test_bf16_inside_autocast_trains_fp32_weights(tiny_base: Path) -> None:
    model = attached(tiny_base, placement="houlsby")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS[None]).logits
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(model).values())


def test_a_base_without_the_places_is_refused() -> None:
    with pytest.raises(ValueError, match="down_proj, o_proj"):
        create(Bottleneck(placement="houlsby")).attach(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("layouts", method_sampled("bottleneck", [(2, 3, False), (3, 2, False)]))
def test_layouts_resume_and_export(
    layouts: list[tuple[int, int, bool]], new_run: Any, launch: Any, cache: Path, held_out: Path
) -> None:
    runs = [
        new_run(
            f"z{zero}-m{micro}",
            method={"kind": "bottleneck", "size": SIZE, "placement": "houlsby"},
            sharding={"zero": zero},
            train={"micro_batch": micro, "lr": 1e-2},
            data={"packing": packing, "eval": str(held_out)},
            evaluation={"max_new_tokens": 3, "before": False},
            checkpoint={"every": 5, "keep": 9},
        )
        for zero, micro, packing in ((0, 1, True), *layouts)
    ]
    launch(2, *runs)
    again = interrupted(runs[-1], "again", 5)
    launch(2, again)
    curves = [curve(run_dir) for run_dir in runs]
    assert max(difference(found, curves[0]) for found in curves) < 1e-6
    assert curve(again, 2) == curves[-1][5:]
    assert loss_gap(load(base(runs[-1]), runs[-1] / "output"), runs[-1], cache) < 1e-5
    assert curves[0][-1][0] < curves[0][0][0]
