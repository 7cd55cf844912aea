"""Weights in bf16 without fp32 masters: rounded at random, they learn as with masters; a resume repeats every bit."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import curve, difference, events, interrupted, saved
from llamas import LLAMA_1B, random_llama
from safetensors.torch import load_file
from torch import nn

from methods.base import Setup
from methods.full import FullTuning
from methods.options.full import Full
from orchestrator.planning.model import Model
from orchestrator.planning.sizes import sizes
from runfolder.job import Job
from trainer.dry_run.forecast import Forecaster
from trainer.dry_run.model import with_layers
from trainer.zero.chunked import ChunkedAdamW
from trainer.zero.rounding import Rounding

STEPS = 30
BF16 = {"precision": "bf16", "lr": 1e-3, "steps": STEPS}
WITHOUT = {**BF16, "master_weights": False}
HALF = {"checkpoint": {"every": 5, "keep": 9}}
FULL = {"kind": "full"}


def rounded(values: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Values in bf16, rounded in a step."""
    rounding = Rounding(0, torch.device("cpu"))
    rounding.begin(step)
    weights = torch.empty_like(values, dtype=torch.bfloat16)
    rounding.set(weights, values.clone(), 3)
    return weights


def test_a_value_goes_to_one_of_its_neighbours_and_is_right_on_average() -> None:
    lower, upper = (torch.tensor(value, dtype=torch.bfloat16) for value in (1.0, 1.0078125))
    for share in (0.1, 0.5, 0.9):
        for sign in (1, -1):
            exact = sign * (float(lower) + share * (float(upper) - float(lower)))
            found = rounded(torch.full((100_000,), exact))
            assert {abs(value) for value in found.unique().tolist()} == {float(lower), float(upper)}
            assert (found.abs() == upper).float().mean().item() == pytest.approx(share, abs=0.01)


def test_what_bf16_has_already_stays() -> None:
    values = torch.randn(10_000).bfloat16()
    assert torch.equal(rounded(values.float()), values)


def test_steps_round_alike_when_repeated_and_otherwise_unlike() -> None:
    values = torch.randn(10_000)
    assert torch.equal(rounded(values, 5), rounded(values, 5))
    assert not torch.equal(rounded(values, 5), rounded(values, 6))


@pytest.mark.parametrize("on_host", [False, True])
def test_steps_far_smaller_than_a_number_of_bf16_add_up(on_host: bool) -> None:
    weight = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0)
    chunked = ChunkedAdamW(optimizer, torch.device("cpu"), on_host)
    for step in range(20):
        weight.grad = torch.ones(100_000)
        chunked.step(step)
    assert weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=1e-4)


def test_gradients_of_weights_in_bf16_add_up_in_fp32() -> None:
    model = FullTuning(Full(freeze=("*embed*",)), Setup(master_weights=False)).attach(random_llama(vocab_size=64))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for _ in range(2):
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) > 10
    assert {parameter.grad.dtype for parameter in trained} == {torch.float32}


def test_it_learns_as_with_masters(new_run: Any, launch: Any) -> None:
    masters, alone, pair, lisa = (
        new_run(name, method=method, train=train)
        for name, method, train in (
            ("masters", FULL, BF16),
            ("alone", FULL, WITHOUT),
            ("pair", FULL, WITHOUT),
            ("lisa", {"kind": "full", "lisa_layers": 1, "lisa_every": 2}, WITHOUT),
        )
    )
    launch(1, masters, alone)
    launch(2, pair, lisa)
    with_masters, without, on_two = (losses(run) for run in (masters, alone, pair))
    fallen = with_masters[0] - statistics.mean(with_masters[-5:])
    assert fallen > 0.5
    for found in (without, on_two):
        gaps = [abs(one - other) for one, other in zip(found, with_masters, strict=True)]
        assert max(gaps) < 0.05 * fallen
    assert losses(lisa)[-1] < losses(lisa)[0] - 0.3
    assert difference(curve(pair)[:1], curve(alone)[:1]) < 5e-3


def losses(run_dir: Path) -> list[float]:
    """The loss of each step."""
    return [loss for loss, _ in curve(run_dir)]


@pytest.mark.parametrize(("first", "then"), [("none", "none"), ("none", "optimizer"), ("optimizer", "none")])
def test_resume_is_bitwise_wherever_moments_were(first: str, then: str, new_run: Any, launch: Any) -> None:
    train = {**WITHOUT, "steps": 10}
    whole = new_run("whole", method=FULL, train=train, sharding={"offload": first}, **HALF)
    launch(2, whole)
    again = interrupted(whole, "again", 5, sharding={"offload": then})
    launch(2, again)
    assert curve(again, 2) == curve(whole)[5:]
    one, other = (load_file(run / "output" / "model.safetensors") for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {weight.dtype for weight in one.values()} == {torch.bfloat16}
    assert (one["model.norm.weight"] != 1).any()  # where the nearest number is always the one that it was
    checkpoint = saved(whole, 10)
    name = "model.norm.weight"
    assert checkpoint.read("weight", name, 0, 4).dtype == torch.bfloat16
    assert checkpoint.read("exp_avg", name, 0, 4).dtype == torch.float32
    (compared,) = (event for event in events(whole) if event["event"] == "compared")
    assert compared["gap"] <= compared["allowed"]


@pytest.mark.gpu
def test_the_fast_path_is_the_plain_one(new_run: Any, launch: Any) -> None:
    assert torch.cuda.is_available(), "a GPU is needed"
    train = {**WITHOUT, "steps": 6, "lr": 1e-4}
    runs = {}
    for kernels, where in (("plain", "none"), ("fast", "none"), ("fast", "optimizer")):
        name = f"{kernels}-{where}"
        runs[name] = new_run(name, method=FULL, train={**train, "kernels": kernels}, sharding={"offload": where})
    launch(1, *runs.values())
    (plan,) = (event for event in events(runs["fast-none"]) if event["event"] == "plan")
    assert plan["kernels"], plan["kernel_problems"]
    for found, expected in zip(losses(runs["fast-none"]), losses(runs["plain-none"]), strict=True):
        assert found == pytest.approx(expected, rel=5e-3)
    assert curve(runs["fast-optimizer"]) == curve(runs["fast-none"])


def job(**parts: Any) -> Job:
    """A job of rows of 2,048 tokens."""
    data = {"train": "/x.jsonl", "seq_len": 2048}
    changed = parts.pop("train", {})
    train = {"steps": 3, "batch_tokens": 8192, "precision": "bf16", **changed}
    return Job.model_validate({"base": "some/base", "method": "full", "data": data, "train": train, **parts})


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"method": "lora"}, "method lora; allowed: method full"),
        ({"method": "galore"}, "method galore; allowed: method full"),
        ({"sharding": {"zero": 1}}, "sharding.zero 1; allowed: sharding.zero 0"),
        ({"train": {"precision": "auto"}}, "train.precision auto; allowed: train.precision bf16"),
    ],
)
def test_where_it_cannot_be_is_said_in_one_line(parts: dict[str, Any], problem: str) -> None:
    train = {**parts.pop("train", {}), "master_weights": False}
    with pytest.raises(ValueError, match=f"train.master_weights false with {problem}"):
        job(train=train, **parts)


def test_the_plan_knows_the_bytes_of_each_weight() -> None:
    config = with_layers(LLAMA_1B, 3)
    planned = sizes(job(train={"master_weights": False}), Model(config))
    assert planned is not None
    documents = [(2048, 2047)] * 4
    for where, of_moments in (("none", 8), ("optimizer", 0)):
        without = job(train={"master_weights": False}, sharding={"offload": where})
        found = Forecaster().forecast(without, config, documents, "bf16", fast=False, of_passes=True)
        for part, of_each in {"weights": 2, "gradients": 4, "optimizer": of_moments}.items():
            assert found[part] == pytest.approx(of_each * planned.trained, rel=1e-3, abs=2**20), part
    memory = planned.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(n * planned.trained for n in (2, 4, 8))
    with_masters = Forecaster().forecast(job(), config, documents, "bf16", fast=False, of_passes=True)
    assert sum(found.values()) < sum(with_masters.values())
