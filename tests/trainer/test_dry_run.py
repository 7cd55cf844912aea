"""Dry runs, against stored figures: a change of the trainer that takes more memory fails here, without a GPU."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import LLAMA_1B, TWO_LAYERS, random_llama

from methods.base import Setup
from methods.options.full import Full
from methods.registry import create
from runfolder.job import Job
from trainer.dry_run import forecast as forecasts
from trainer.dry_run.forecast import Forecaster
from trainer.dry_run.kernels import LayerTracer
from trainer.dry_run.line import whole_base
from trainer.dry_run.longest import longest_micro_batch
from trainer.dry_run.model import with_layers
from trainer.dry_run.process import TRIAL
from trainer.dry_run.steps import DryRun, Passes, TriedPasses, alone
from trainer.dry_run.zero import Weights, shared
from trainer.zero.engine import Alone
from trainer.zero.sharded import ShardedModel

FIGURES = Path(__file__).parent / "dry_run_figures.json"
CELLS = json.loads(FIGURES.read_text())["cells"]
SMALL = with_layers(LLAMA_1B, 3)
STORED = 0.03  # how far a dry run may be from what is stored
MEASURED = 0.05  # how far from what a GPU had
# The documents of a micro-batch: as benchmarks/layouts.py makes them, and as benchmarks/train_step.py does.
DOCUMENTS = {"padded": [(1726, 1725), (1710, 1709), (1699, 1698), (1681, 1680)], "full": [(2048, 2047)] * 4}


def job_of(method: dict[str, Any], **train: Any) -> Job:
    """A job of rows of 2,048 tokens."""
    objective = train.pop("objective", "sft")
    settings = {"steps": 3, "batch_tokens": 8192, **train}
    data = {"train": "/x.jsonl", "seq_len": 2048}
    parts = {"base": "some/base", "objective": objective, "method": method, "data": data, "train": settings}
    return Job.model_validate(parts)


def foretold(cell: dict[str, Any]) -> float:
    """The GiB of a cell."""
    checkpointed = cell.get("checkpointed", False)
    objective = cell.get("objective", "sft")
    job = job_of({"kind": cell["method"]}, gradient_checkpointing=checkpointed, objective=objective)
    stage = job.sharding.model_copy(update={"zero": cell.get("zero", 0)})
    workers = job.resources.model_copy(update={"gpus_per_node": cell.get("workers", 1)})
    job = job.model_copy(update={"sharding": stage, "resources": workers})
    fast = cell["kernels"] == "fast"
    found = Forecaster().forecast(job, LLAMA_1B, DOCUMENTS[cell["rows"]], "bf16", fast)
    torch._dynamo.reset()
    return sum(found.values()) / 2**30


def parameters() -> Iterator[Any]:
    """The cells, of which `make soak` has those that take long, or are much like others."""
    for cell in CELLS:
        name = f"{cell['method']}-{cell['kernels']}-{cell['rows']}-{cell.get('zero', 0)}-{cell.get('workers', 1)}"
        if cell.get("checkpointed"):
            name += "-checkpointed"
        if "objective" in cell:
            name += f"-{cell['objective']}"
        marks = [pytest.mark.soak] if cell.get("soak") else []
        yield pytest.param(cell, id=name, marks=marks)


@pytest.mark.parametrize("cell", list(parameters()))
def test_a_dry_run_foretells_what_it_did(cell: dict[str, Any]) -> None:
    assert foretold(cell) == pytest.approx(cell["foretold"], rel=STORED)


def test_stored_figures_are_near_to_what_a_gpu_had() -> None:
    measured = [cell for cell in CELLS if "measured" in cell]
    assert len(measured) > 5
    for cell in measured:
        assert cell["foretold"] == pytest.approx(cell["measured"], rel=MEASURED), cell


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_memory_is_a_straight_line_in_the_number_of_layers(kind: str) -> None:
    passes = Passes(job_of({"kind": kind}), DOCUMENTS["padded"], torch.bfloat16, fast=False)
    config = with_layers(LLAMA_1B, 6)
    whole = DryRun(passes).on(config)
    assert whole_base(passes, config) == whole


def test_each_weight_is_counted_once_and_optimizer_and_gradients_are_those_of_full_training() -> None:
    passes = Passes(job_of({"kind": "full"}), DOCUMENTS["padded"], torch.bfloat16, fast=False)
    found = whole_base(passes, LLAMA_1B)
    assert (found.trained, found.frozen) == (1_235_814_400, 0)
    worst = found.moments["backward"]
    for part, of_each in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
        assert worst[part] == pytest.approx(of_each * found.trained, rel=1e-3)


def test_zero_shares_what_it_says() -> None:
    weights = Weights(trained=10**9, frozen=0, element=2)
    alone_ = {"weights": 4 * 10**9, "gradients": 4 * 10**9, "optimizer": 8 * 10**9, "activations": 7, "gathers": 0}
    one = shared(alone_, weights, 1, 2)
    two = shared(alone_, weights, 2, 2)
    three = shared(alone_, weights, 3, 2)
    assert shared(alone_, weights, 0, 1) == alone_
    assert (one["weights"], one["gradients"], one["optimizer"]) == (4 * 10**9, 4 * 10**9, 6 * 10**9)
    assert two["gradients"] == 2 * 10**9
    assert three["weights"] == 2 * 10**9
    assert three["activations"] == 7


def test_at_zero_3_a_layer_is_on_its_way_and_its_gradients_are_there_together() -> None:
    alone_ = {"weights": 8000, "gradients": 400, "optimizer": 0, "gathers": 0}
    layers = [shared(alone_, Weights(100, 3800, 2, of_layer=size), 3, 2) for size in (0, 500)]
    assert layers[1]["gathers"] - layers[0]["gathers"] == 500 * 2
    assert layers[1]["gradients"] - layers[0]["gradients"] == 100 * 4


def test_at_zero_3_frozen_linears_keep_no_more_than_at_zero_0() -> None:
    config = with_layers(LLAMA_1B, 2)
    job = job_of({"kind": "lora"})
    sharded = job.model_copy(update={"sharding": job.sharding.model_copy(update={"zero": 3})})
    expected, found = (
        Forecaster().forecast(each, config, [(512, 511)], "bf16", fast=False) for each in (job, sharded)
    )
    assert found["activations"] == pytest.approx(expected["activations"], rel=1e-3)


def test_weights_in_4_bits_are_whole_on_every_worker() -> None:
    weights = Weights(trained=0, frozen=1000, element=2, held=6000)
    of_each = shared({"weights": 8000, "gradients": 0, "optimizer": 0, "gathers": 0}, weights, 3, 2)
    assert of_each["weights"] == 6000 + 1000


def test_a_base_that_comes_in_4_bits_is_held_as_one_that_is_put_there() -> None:
    documents = DOCUMENTS["padded"]
    config = with_layers(LLAMA_1B, 2)
    settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    found = Forecaster().forecast(
        job_of({"kind": "lora"}), {**config, "quantization_config": settings}, documents, "bf16", fast=False
    )
    assert found == Forecaster().forecast(job_of({"kind": "qlora"}), config, documents, "bf16", fast=False)
    settings["llm_int8_skip_modules"] = ["lm_head", "mlp"]
    more = Forecaster().forecast(
        job_of({"kind": "lora"}), {**config, "quantization_config": settings}, documents, "bf16", fast=False
    )
    assert more["weights"] > found["weights"] + 2 * 3 * 2048 * 8192


@pytest.mark.parametrize("kind", ["lora", "qlora", "longlora"])
def test_layers_share_one_compilation_on_the_fast_path(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    trace = LayerTracer.__call__

    def counted(tracer: LayerTracer, *region: Any) -> Any:
        compiled.append(region)
        return trace(tracer, *region)

    monkeypatch.setattr(LayerTracer, "__call__", counted)
    found = Forecaster().forecast(job_of({"kind": kind}), SMALL, DOCUMENTS["full"], "bf16", fast=True)
    torch._dynamo.reset()
    assert found["activations"] > 0
    assert len(compiled) == 1


def test_its_process_ends_in_the_middle_of_a_request_whose_maker_has_died() -> None:
    job = job_of({"kind": "lora"}).dump()
    how = {"precision": "bf16", "fast": True, "tried": False}
    request = json.dumps({"job": job, "config": LLAMA_1B, "sample": [(64, 63)], **how})
    ended = subprocess.run(TRIAL, input=f"{request}\n", capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_stages_that_share_no_weights_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def counted(passes: Passes, config: Any) -> TriedPasses:
        tried.append(passes.job.sharding.zero)
        return whole_base(passes, config)

    monkeypatch.setattr(forecasts, "whole_base", counted)
    forecaster = Forecaster()
    job = job_of({"kind": "lora"})
    resources = job.resources.model_copy(update={"gpus_per_node": 2})
    of_stages = []
    for stage in range(4):
        sharding = job.sharding.model_copy(update={"zero": stage})
        changed = job.model_copy(update={"sharding": sharding, "resources": resources})
        of_stages.append(forecaster.forecast(changed, SMALL, [(512, 511)], "bf16", fast=False))
    assert tried == [0, 3]
    assert of_stages[1]["optimizer"] < of_stages[0]["optimizer"]
    assert of_stages[3]["weights"] < of_stages[0]["weights"]


def test_the_longest_micro_batch_of_pairs_has_both_answers() -> None:
    sample = [(length, length - 10) for length in range(100, 200)]
    pairs = job_of({"kind": "lora"}, objective="dpo", micro_batch=1)
    unpacked = pairs.model_copy(update={"data": pairs.data.model_copy(update={"packing": False})})
    assert longest_micro_batch(unpacked, sample, in_one_row=False) == [(199, 189), (198, 188)]
    packed = longest_micro_batch(pairs, sample, in_one_row=False)
    assert len(packed) % 2 == 0
    assert 1500 < sum(length for length, _ in packed) <= 2048


def test_a_base_that_sees_less_than_a_row_keeps_rows_and_masks_on_the_fast_path() -> None:
    shape = {**TWO_LAYERS, "model_type": "mistral", "vocab_size": 320}
    job = job_of({"kind": "lora"})
    request = {"job": job.dump(), "sample": [(100, 60)], "precision": "bf16", "fast": True, "tried": False}
    bytes_of = {}
    for seen_back in (64, 2048):
        answer = Forecaster().reply({**request, "config": {**shape, "sliding_window": seen_back}})
        torch._dynamo.reset()
        bytes_of[seen_back] = sum(answer["bytes"].values())
    assert bytes_of[64] > bytes_of[2048]


def test_a_step_lets_go_of_its_gradients() -> None:
    model = random_llama(vocab_size=64)
    method = create(Full(), Setup())
    with alone():
        sharded = ShardedModel(method.attach(model), method, 0, start=Alone)
        ids = torch.zeros(1, 8, dtype=torch.long)
        sharded.backward(sharded.engine(input_ids=ids).logits.sum())
        sharded.step(1e-3, None)
    assert all(fragment.parameter.grad is None for fragment in sharded.fragments())


def test_answers_count_where_they_take_more_than_training() -> None:
    lean = job_of({"kind": "lora"}, micro_batch=1, gradient_checkpointing=True)
    judged = lean.data.model_copy(update={"eval": "/y.jsonl"})
    evaluation = lean.evaluation.model_copy(update={"max_new_tokens": 1000})
    writing = lean.model_copy(update={"data": judged, "evaluation": evaluation})
    config = with_layers(LLAMA_1B, 3)
    short = [(40, 16)]
    without = Forecaster().forecast(lean, config, short, "bf16", fast=False)
    found = Forecaster().forecast(writing, config, short, "bf16", fast=False)
    assert without["cache"] == 0
    assert found["cache"] == 16 * (24 + 1000) * 2 * 8 * 64 * 2 * (3 + 1)  # as many as 16,384 tokens make
    assert found["weights"] == without["weights"]
    longer = Forecaster().forecast(writing, config, DOCUMENTS["padded"], "bf16", fast=False)
    assert longer["cache"] == 0  # training takes more
    assert Forecaster().forecast(writing, config, short, "bf16", fast=False, of_passes=True)["cache"] == 0


def test_what_is_tried_has_no_step_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = {"forward": {"activations": 2}, "backward": {"activations": 3}, "step": {"activations": 9}}
    monkeypatch.setattr(forecasts, "whole_base", lambda *_: TriedPasses(moments, 1, 1))
    job = job_of({"kind": "full"})
    monkeypatch.setattr(forecasts, "answering", lambda *_: {"activations": 1})
    assert Forecaster().forecast(job, LLAMA_1B, [(16, 15)], "bf16", fast=False) == moments["step"]
    assert Forecaster().forecast(job, LLAMA_1B, [(16, 15)], "bf16", fast=False, of_passes=True) == moments["backward"]
