"""ReLoRA against the paper's steps written out: merge, restart, state, learning rate; layouts, kills, output.

In 4 bits a merged weight is rounded to one of 16 codes. What differs in its last bits (layouts, numbers of threads
and processors sum in another order) may then fall to either side of the edge between two, and the curve goes another
way by some 1e-5. No rule of rounding can help: it moves the edges, and a value may lie on any. Hence the
transcription checks that a run chose the nearest codes, to 1e-4 of the block's largest value, and goes on with the
run's.
"""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from by_hand import adamw, base, train
from finished_runs import Curve, curve, difference, interrupted, loss_gap, saved
from safetensors.torch import load_file
from sampling import method_sampled
from torch import nn
from transformers import AutoModelForCausalLM

from methods.base import Setup
from methods.options.low_rank_merged import ReLora
from methods.parts.restarts import new_start
from methods.relora import ReLoraTuning
from runfolder.job import Job
from runfolder.record import load_job
from trainer.schedule import learning_rate

METHOD = {"kind": "relora", "rank": 2, "every": 0.25, "rewarmup": 0.1}
STEPS = 24
EVERY = 6


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
    adapted = peft.get_peft_model(
        base(run_dir),
        peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=list(load_job(run_dir).method.exclude)),
    )
    starts = {name: p.detach() for name, p in adapted.named_parameters() if "lora_A" in name}
    model, factors = base(run_dir), []
    for name, start in starts.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        factor = Factors(model.get_submodule(module), name, start)
        model.set_submodule(module, factor)
        factors.append(factor)
    return model, factors


def restarts(done: int, full: int) -> bool:
    """After every 6 steps from `full` on, as long as two steps of warm-up remain."""
    return done > 0 and done >= full and (done - full) % EVERY == 0 and done + 2 < STEPS


def jagged(run_dir: Path, step: int, full: int) -> float:
    """The cosine, with two steps of warm-up after a restart and after `full` steps of the weights themselves."""
    job = load_job(run_dir)
    start = full + (step - full) // EVERY * EVERY
    if restarts(start, full) and step - start < 2:
        return learning_rate(job, start + 2, STEPS) * (step - start + 1) / 2
    return learning_rate(job, step, STEPS)


def in_4_bits(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes makes of a weight."""
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


def assert_nearest(chosen: torch.Tensor, levels: torch.Tensor, values: torch.Tensor) -> None:
    """Each value, at most 1, has the level that is nearest to it, or one that is farther by less than 1e-4.

    (The edges between bitsandbytes' own 8-bit levels are off by 1e-5; 4-bit levels are 0.08 apart, and more.)
    """
    distance = (levels[chosen.long()] - values).abs()
    least = (levels[:, None] - values).abs().amin(0)
    assert (distance - least).max() < 1e-4


def as_in_the_run(run_dir: Path, step: int, layer: str, weight: torch.Tensor) -> torch.Tensor:
    """What a run made of a weight after a step: its codes, once they are known to be those nearest to our values."""
    reader = saved(run_dir, step)

    def read(kind: str, like: torch.Tensor) -> torch.Tensor:
        return reader.read(kind, f"{layer}.{kind}", 0, like.numel()).view(like.shape)

    own_packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed = read("packed", own_packed)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)
    assert_nearest(codes, get_4bit_type("nf4", device="cpu"), (blocks / largest[:, None]).view(-1))
    # Double quantisation: the blocks' largest values are rounded too, as shares of their largest distance to a mean.
    offset, group = read("offset", state.offset), read("group_absmax", state.state2.absmax)
    assert torch.allclose(offset, state.offset, rtol=1e-5) and torch.allclose(group, state.state2.absmax, rtol=1e-5)
    absmax = read("absmax", state.absmax)
    assert_nearest(absmax, state.state2.code, (largest - state.offset) / state.state2.absmax)
    state.absmax, state.state2.absmax, state.offset = absmax, group, offset
    return dequantize_4bit(packed, state)


def transcription(run_dir: Path, cache: Path, keep: float = 0, full: int = 0, quantised: bool = False) -> Curve:
    """The paper's training loop: `full` steps of the weights themselves, then factors over them, or over 4 bits."""
    model, factors = with_factors(run_dir)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    for weight in weights:
        weight.requires_grad_(full > 0)
        weight.data = in_4_bits(weight.data) if quantised else weight.data
    optimizer = adamw(model)
    method = ReLoraTuning(ReLora(rank=2), Setup(STEPS))

    def before(k: int) -> None:
        for parameter in [f for factor in factors for f in (factor.a, factor.b)] if k < full else weights:
            parameter.grad = None

    @torch.no_grad()
    def after(k: int) -> None:
        if k + 1 == full or not restarts(k + 1, full):
            return
        for factor in factors:
            merged = factor.linear.weight + 2 * factor.b @ factor.a
            if quantised:
                layer = factor.name.removesuffix(".lora_A.default.weight")
                merged = as_in_the_run(run_dir, k + 1, layer, merged)
            factor.linear.weight.copy_(merged)
            factor.a.copy_(new_start(factor.name, factor.a.shape, method.setup.seed, k + 1))
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

    return train(
        run_dir, cache, model, optimizer, rate=lambda k: jagged(run_dir, k, full), before=before, after=after
    )


VARIANTS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {  # stages, options, by hand
    "plain": ((0, 2), {}, {}),
    "keep": ((3,), {"keep": 0.1}, {"keep": 0.1}),
    "warm": ((2,), {"full_rank": 0.25}, {"full": 6}),
    "warm, kept": ((3,), {"full_rank": 5 / 24, "keep": 0.1, "exclude": ["k_proj"]}, {"keep": 0.1, "full": 5}),
    "4 bits": ((3,), {"quantised": True}, {"quantised": True}),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variants", method_sampled("relora", list(VARIANTS)))
def test_layouts_resume_and_output(
    variants: list[str], new_run: Any, launch: Any, cache: Path, held_out: Path
) -> None:
    parts: dict[str, Any] = {
        "train": {"steps": STEPS, "lr": 1e-2, "micro_batch": 2},
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
        "checkpoint": {"every": 6, "keep": 9},
    }
    runs = {
        (name, zero): new_run(f"{name} {zero}", sharding={"zero": zero}, method=METHOD | options, **parts)
        for name, (stages, options, _) in VARIANTS.items()
        for zero in stages
        if name in variants
    }
    launch(2, *runs.values())
    last = {name: run for (name, _), run in runs.items()}
    expected = {name: transcription(run, cache, **VARIANTS[name][2]) for name, run in last.items()}
    worst = {run.name: difference(curve(run), expected[name]) for (name, _), run in runs.items()}
    print(worst)
    assert max(worst.values()) < 1e-6
    plain = transcription(next(iter(last.values())), cache)
    assert all(1e-4 < difference(plain, expected[name]) < 10 for name in variants if name != "plain")
    again = {name: interrupted(run, f"{name} again", 12) for name, run in last.items()}
    other = {name: interrupted(run, f"{name} other", 6, sharding={"zero": 1}) for name, run in last.items()}
    launch(2, *again.values(), *other.values())
    for name, whole in last.items():
        assert curve(again[name], 2) == curve(whole)[12:], name
        one, two = (load_file(run / "output" / "model.safetensors") for run in (again[name], whole))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        # In 4 bits the other layout may choose other codes.
        options = VARIANTS[name][2]
        uncut = transcription(other[name], cache, **options) if options.get("quantised") else curve(whole)
        assert difference(curve(other[name], 2), uncut[6:]) < 1e-5, name
    for run in runs.values():
        loaded = AutoModelForCausalLM.from_pretrained(run / "output")
        assert loss_gap(loaded, run, cache) < 1e-5


def test_learning_rate_warms_up_after_each_restart_and_not_before_the_job_has() -> None:
    method = ReLoraTuning(ReLora(every=0.1, rewarmup=0.05), Setup(100))

    def base_rate(step: int) -> float:
        return (step + 1) / 30 if step < 30 else 0.5 * (1 + math.cos(math.pi * (step - 30) / 70))

    rate = method.schedule(base_rate)
    assert [step for step in range(101) if method.restarts.due(step)] == [30, 40, 50, 60, 70, 80, 90]
    assert [rate(step) for step in range(30)] == [base_rate(step) for step in range(30)]
    assert [rate(40 + i) for i in range(4)] == pytest.approx([base_rate(45) * (i + 1) / 5 for i in range(4)])
    assert rate(44) == pytest.approx(base_rate(45)) and rate(45) == base_rate(45)


def test_what_is_trained() -> None:
    linears, others = {"layers.0.q_proj": (8, 8)}, {"embed_tokens.weight": (10, 8), "norm.weight": (8,)}
    assert ReLora(rank=2).trained_parameters(linears, others) == 2 * 16 + 88
    assert ReLora(rank=2, others=False).trained_parameters(linears, others) == 2 * 16
    warm = ReLora(rank=2, full_rank=0.1)
    assert warm.trained_parameters(linears, others) == 2 * 16 + 88 + 64
    assert warm.optimizer_bytes(linears, others) == (8 * (64 + 88), 0)
    assert ReLora(rank=2, quantised=True).frozen_bytes(linears, others, 4) == (0, 33)  # 64 half bytes, a constant


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="rewarmup"):
        ReLora(every=0.1, rewarmup=0.1)
    with pytest.raises(ValueError, match="nearest: a job of kind full"):
        ReLora(full_rank=0.1, quantised=True)
    job = {"base": {"model": "-", "init": "scratch"}, "data": {"train": "-"}, "train": {"steps": 1}}
    with pytest.raises(ValueError, match="random weights are not worth quantising"):
        Job.model_validate(job | {"method": {"kind": "relora", "quantised": True}})
