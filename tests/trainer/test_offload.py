"""AdamW's moments on the host: every bit as with them on the device, at every stage, also after a change of mind."""

import itertools
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import METHODS, TRAIN
from finished_runs import curve, interrupted
from llamas import LLAMA_1B, random_llama
from ports import free_port
from safetensors.torch import load_file
from sampling import SEED
from torch import nn

from methods.base import Setup
from methods.options.full import Full
from methods.registry import create
from runfolder.job import Job
from trainer.dry_run.forecast import Forecaster
from trainer.dry_run.model import with_layers
from trainer.world import join_process_group
from trainer.zero import chunked
from trainer.zero.chunked import ChunkedAdamW
from trainer.zero.sharded import ShardedModel

# By method and more: what clears moments, what reads them, and what steps some weights alone.
VARIANTS: dict[str, dict[str, Any]] = {kind: options for kind, options in METHODS.items() if kind != "galore"}
VARIANTS |= {
    "lisa": {"kind": "full", "lisa_layers": 1, "lisa_every": 2},
    "relora-keep": {"kind": "relora", "rank": 4, "every": 0.3, "keep": 0.1},
}
CASES = list(itertools.product(VARIANTS, (0, 1, 2, 3)))
ON_HOST = {"offload": "optimizer"}
HALF = {"checkpoint": {"every": 5, "keep": 9}}


def sample() -> list[Any]:
    """Cases for `make test`: each ZeRO stage once, with a method that steps odd ones out among them."""
    rng = random.Random(SEED)
    kinds = [*rng.sample(sorted(set(VARIANTS) - {"lisa", "relora-keep"}), 2), "lisa", "relora-keep"]
    few = list(zip(kinds, rng.sample(range(4), 4), strict=True))
    return [pytest.param(few, id="sample"), pytest.param(CASES, id="all", marks=pytest.mark.matrix)]


@pytest.mark.timeout(6000)
@pytest.mark.parametrize("cases", sample())
def test_every_method_is_the_same_with_moments_on_the_host(
    cases: Sequence[tuple[str, int]], new_run: Any, launch: Any
) -> None:
    for variant, zero in cases:
        kind = VARIANTS[variant]["kind"]
        job = {"method": VARIANTS[variant], "train": TRAIN[kind]}
        plain = new_run(f"{variant}-plain-{zero}", sharding={"zero": zero}, **job)
        hosted = new_run(f"{variant}-hosted-{zero}", sharding={"zero": zero, **ON_HOST}, **job)
        launch(2, plain, hosted)
        assert curve(hosted) == curve(plain), (variant, zero)
        assert_same_output(hosted, plain)


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize(
    ("first", "then"), [("optimizer", "optimizer"), ("none", "optimizer"), ("optimizer", "none")]
)
def test_resume_is_bitwise_wherever_moments_were(first: str, then: str, zero: int, new_run: Any, launch: Any) -> None:
    method = {"kind": "full"}
    whole = new_run("whole", method=method, train=TRAIN["full"], sharding={"zero": zero, "offload": first}, **HALF)
    launch(2, whole)
    again = interrupted(whole, "again", 5, sharding={"zero": zero, "offload": then})
    launch(2, again)
    assert curve(again, 2) == curve(whole)[5:]
    assert_same_output(again, whole)


def assert_same_output(one: Path, other: Path) -> None:
    """Two runs left the same weights, bit for bit."""
    names = sorted(path.name for path in (one / "output").glob("*.safetensors"))
    assert names
    for name in names:
        weights, others = load_file(one / "output" / name), load_file(other / "output" / name)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name


def groups(device: str) -> list[dict[str, Any]]:
    """Parameters of odd sizes in two groups, of which some are longer than a chunk and some end where one does."""
    torch.manual_seed(0)
    sizes = ([1000, 3, 64, 192, 256], [700, 1])
    made = [[nn.Parameter(torch.randn(size, device=device)) for size in of_group] for of_group in sizes]
    return [{"params": made[0], "lr": 1e-2}, {"params": made[1], "lr": 3e-2}]


def trained(hosted: bool, device: str = "cpu", **adam: Any) -> list[torch.Tensor]:
    """Weights and moments after some steps, in which one parameter or another has no gradient or starts anew."""
    optimizer = torch.optim.AdamW(groups(device), weight_decay=0.1, **adam)
    moments = ChunkedAdamW(optimizer, torch.device(device), on_host=True) if hosted else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(6):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) if (number + step) % 4 else None
        if step == 3:
            if moments:
                moments.wait()
            optimizer.state[parameters[0]].clear()
        moments.step(step) if moments else optimizer.step()
    if moments:
        moments.wait()
    states = [value for parameter in parameters for _, value in sorted(optimizer.state[parameter].items())]
    return [value.detach().cpu() for value in (*parameters, *states)]


@pytest.mark.parametrize("adam", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_in_chunks_is_that_of_adamw(adam: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 256)
    found, expected = trained(True, **adam), trained(False, **adam)
    assert len(found) == len(expected) == 7 * 4
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("adam", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_in_chunks_is_that_of_adamw_on_a_gpu(adam: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available(), "a GPU is needed"
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 256)
    found, expected = trained(True, "cuda", **adam), trained(False, "cuda", **adam)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 2])
def test_a_run_on_a_gpu_is_the_same_with_moments_on_the_host(zero: int, new_run: Any, launch: Any) -> None:
    assert torch.cuda.is_available(), "a GPU is needed"
    train = {**TRAIN["full"], "precision": "bf16", "kernels": "fast"}
    plain, hosted = (
        new_run(where, method={"kind": "full"}, train=train, sharding={"zero": zero, "offload": where})
        for where in ("none", "optimizer")
    )
    launch(1, plain, hosted)
    assert curve(hosted) == curve(plain)


@pytest.mark.usefixtures("workers")  # it makes forks cheap
def test_masters_are_the_weights_themselves_at_every_stage(tmp_path: Path) -> None:
    """At stages 1 and 2 DeepSpeed keeps a copy of them otherwise."""
    torch.multiprocessing.start_processes(compare_memory, (str(tmp_path), free_port()), 1, start_method="forkserver")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"1 none": False, "1 optimizer": True, "2 none": False, "2 optimizer": True}


def compare_memory(_: int, folder: str, port: int) -> None:
    """The one worker, which looks at stages with and without offload where the masters of the first weight lie."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join_process_group()
    found = {}
    for zero, where in itertools.product((1, 2), ("none", "optimizer")):
        method = create(Full(), Setup())
        model = method.attach(random_llama(vocab_size=64))
        sharded = ShardedModel(model, method, zero, offload=where == "optimizer")
        (first, *_) = (each for each in sharded.fragments() if each.start == 0)
        weight = model.get_parameter(first.name)
        found[f"{zero} {where}"] = first.parameter.data_ptr() == weight.data_ptr()
    Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_other_optimizers_are_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(TypeError, match="found the optimizer SGD"):
        ChunkedAdamW(optimizer, torch.device("cpu"), on_host=True)


def job(**parts: Any) -> Job:
    """A job of rows of 2,048 tokens."""
    data = {"train": "/x.jsonl", "seq_len": 2048}
    train = {"steps": 3, "batch_tokens": 8192}
    return Job.model_validate({"base": "some/base", "method": "full", "data": data, "train": train, **parts})


def test_a_method_with_moments_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="sharding.offload optimizer with method galore: its moments"):
        job(method="galore", sharding=ON_HOST)


def test_a_dry_run_finds_a_few_chunks_where_the_moments_were() -> None:
    config = with_layers(LLAMA_1B, 3)
    documents = [(2048, 2047)] * 4
    there, here = (
        Forecaster().forecast(job(sharding={"offload": where}), config, documents, "bf16", fast=False, of_passes=True)
        for where in ("none", "optimizer")
    )
    moments = 2 * there["weights"]
    assert there["optimizer"] == pytest.approx(moments, rel=1e-3)
    assert here["optimizer"] < 2**20  # numbers of steps
    assert here == {**there, "optimizer": here["optimizer"]}
    with_step = Forecaster().forecast(job(sharding={"offload": "optimizer"}), config, documents, "bf16", fast=False)
    assert with_step["optimizer"] < moments / 4


def test_at_stages_1_and_2_no_second_copy_of_weights_is_foretold() -> None:
    config = with_layers(LLAMA_1B, 2)
    for zero in (1, 2):
        sharding = {"zero": zero, "offload": "optimizer"}
        found = Forecaster().forecast(job(sharding=sharding), config, [(64, 63)], "bf16", fast=False, of_passes=True)
        assert found["optimizer"] < 2**20
