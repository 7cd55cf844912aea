"""ReLoRA against the paper's steps written out: merge, restart, state, learning rate; layouts, kills, output."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from by_hand import base, train
from finished_runs import curve, difference, interrupted, saved_loss
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from methods.base import Setup
from methods.options import ReLora
from methods.relora import ReLoraTuning
from trainer.attempt import load_job
from trainer.export import results
from trainer.schedule import learning_rate

METHOD = {"kind": "relora", "rank": 2, "every": 0.25, "rewarmup": 0.1}
STEPS = 24
RESTARTS = (6, 12, 18)


class Factors(nn.Module):
    """W x + s B A x, with s = 2."""

    def __init__(self, linear: nn.Linear, name: str, a: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.name = linear, name
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(torch.zeros(linear.out_features, len(a)))
        linear.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) + 2 * (x @ self.a.T) @ self.b.T
        return out


def with_factors(run_dir: Path) -> tuple[nn.Module, list[Factors]]:
    """The base with factors that start as PEFT's do."""
    adapted = peft.get_peft_model(base(run_dir), peft.LoraConfig(r=2, target_modules="all-linear"))
    starts = {name: p.detach() for name, p in adapted.named_parameters() if "lora_A" in name}
    model, factors = base(run_dir), []
    for name, start in starts.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        factor = Factors(model.get_submodule(module), name, start)
        model.set_submodule(module, factor)
        factors.append(factor)
    return model, factors


def jagged(run_dir: Path, step: int) -> float:
    """The cosine, with two steps of warm-up after a restart."""
    job = load_job(run_dir)
    start = step // 6 * 6
    if start and step - start < 2:
        return learning_rate(job, start + 2, STEPS) * (step - start + 1) / 2
    return learning_rate(job, step, STEPS)


def transcription(run_dir: Path, cache: Path, keep: float) -> list[tuple[float, float]]:
    """The paper's training loop."""
    model, factors = with_factors(run_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    method = ReLoraTuning(ReLora(rank=2), Setup(STEPS))

    @torch.no_grad()
    def after(k: int) -> None:
        if k + 1 not in RESTARTS:
            return
        for factor in factors:
            factor.linear.weight += 2 * factor.b @ factor.a
            factor.a.copy_(method.start(factor.name, factor.a.shape, k + 1))
            factor.b.zero_()
            for parameter in (factor.a, factor.b):
                if keep == 0:
                    del optimizer.state[parameter]
                    continue
                first, second = (optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq"))
                kept = first.abs().flatten().sort(descending=True).indices[: int(keep * first.numel())]
                mask = torch.zeros(first.numel()).index_fill_(0, kept, 1.0).view_as(first)
                first.mul_(mask)
                second.mul_(mask)

    return train(run_dir, cache, model, optimizer, rate=lambda k: jagged(run_dir, k), after=after)


@pytest.mark.timeout(600)
def test_layouts_resume_and_output(new_run: Any, launch: Any, cache: Path, sums: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join(sums.read_text().splitlines()[:40]))
    parts: dict[str, Any] = {
        "train": {"steps": STEPS, "lr": 1e-2},
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
        "checkpoint": {"every": 6, "keep": 9},
    }
    runs = {
        (zero, keep): new_run(f"zero{zero}-{keep}", sharding={"zero": zero}, method={**METHOD, "keep": keep}, **parts)
        for zero, keep in ((0, 0.0), (2, 0.0), (3, 0.0), (3, 0.1))
    }
    launch(2, *runs.values())
    expected = {keep: transcription(runs[3, keep], cache, keep) for keep in (0.0, 0.1)}
    worst = {run.name: difference(curve(run), expected[keep]) for (_, keep), run in runs.items()}
    print(worst)
    assert max(worst.values()) < 1e-6
    assert 1e-4 < difference(expected[0.0], expected[0.1]) < 10
    again = [interrupted(runs[key], f"again{key}", step) for key, step in (((2, 0.0), 6), ((3, 0.1), 12))]
    other = interrupted(runs[3, 0.0], "other", 12, sharding={"zero": 1})
    launch(2, *again, other)
    for run, key in zip(again, ((2, 0.0), (3, 0.1)), strict=True):
        whole = runs[key]
        resumed = curve(run, 2)
        assert resumed == curve(whole)[STEPS - len(resumed) :]
        one, two = (load_file(r / "output" / "model.safetensors") for r in (run, whole))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert difference(curve(other, 2), curve(runs[3, 0.0])[12:]) < 1e-5
    for run in runs.values():
        loaded = AutoModelForCausalLM.from_pretrained(run / "output")
        assert saved_loss(loaded, run, cache) == pytest.approx(results(run)["eval_loss"], rel=1e-5)


def test_learning_rate_warms_up_after_each_restart_and_not_before_the_job_has() -> None:
    method = ReLoraTuning(ReLora(every=0.1, rewarmup=0.05), Setup(100))

    def base_rate(step: int) -> float:
        return (step + 1) / 30 if step < 30 else 0.5 * (1 + math.cos(math.pi * (step - 30) / 70))

    rate = method.schedule(base_rate)
    assert [step for step in range(101) if method.restarts(step)] == [30, 40, 50, 60, 70, 80, 90]
    assert [rate(step) for step in range(30)] == [base_rate(step) for step in range(30)]
    assert [rate(40 + i) for i in range(4)] == pytest.approx([base_rate(45) * (i + 1) / 5 for i in range(4)])
    assert rate(44) == pytest.approx(base_rate(45)) and rate(45) == base_rate(45)


def test_what_is_trained() -> None:
    linears, others = {"layers.0.q_proj": (8, 8)}, {"embed_tokens.weight": (10, 8), "norm.weight": (8,)}
    assert ReLora(rank=2).trained(linears, others) == 2 * 16 + 88
    assert ReLora(rank=2, others=False).trained(linears, others) == 2 * 16
    with pytest.raises(ValueError, match="rewarmup"):
        ReLora(every=0.1, rewarmup=0.1)
