"""The fast path computes what the plain one does, and leaves out what a model is not made for."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from finished_runs import curve, difference, events, interrupted
from llamas import random_llama
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPTJConfig, GPTJForCausalLM

from methods.base import Setup
from methods.lora import LoraTuning
from methods.options.low_rank import Lora
from runfolder.job import Job
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import IGNORED, Layout
from trainer.data.one_row import deal_in_one_row, starts_of_documents
from trainer.kernels import fast, head, layers

CPU = torch.device("cpu")
LORA = LoraTuning(Lora(), Setup())
ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """What is compiled runs as it is written: the compiler takes longer than all of this."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted_llama() -> nn.Module:
    """A small LoRA whose factors are both not zero."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model: nn.Module = peft.get_peft_model(random_llama(), config)
    return model


def a_job(**train: Any) -> Job:
    method = {"kind": "lora"}
    data = {"train": "rows.jsonl", "seq_len": 64}
    return Job.model_validate({"base": "base", "method": method, "data": data, "train": {"steps": 1, **train}})


def with_head(module: nn.Linear) -> Any:
    """What a head knows of its base."""
    return SimpleNamespace(get_output_embeddings=lambda: module)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_losses_in_chunks_are_the_cross_entropy(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LABELS_AT_ONCE", 7)
    torch.manual_seed(0)
    module = nn.Linear(16, 50, bias=False)
    module.weight.requires_grad_(trained)
    hidden = torch.randn(23, 16, requires_grad=True)
    label = torch.randint(50, (23,))
    label[[0, 9]] = IGNORED
    weights = torch.rand(23)

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        wanted = [hidden, module.weight] if trained else [hidden]
        return list(torch.autograd.grad((losses * weights).sum(), wanted))

    expected = cross_entropy(module(hidden), label, ignore_index=IGNORED, reduction="none")
    found = head.LinearHead(with_head(module), torch.float32).losses(hidden, label)
    torch.testing.assert_close(found, expected)
    for grad, true in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "states", "head"])
def test_their_sum_has_the_gradients_of_a_sum(trained: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LABELS_AT_ONCE", 7)
    torch.manual_seed(0)
    module = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(23, 16)
    label = torch.randint(50, (23,))
    label[[0, 9]] = IGNORED
    wanted = [tensor for tensor, is_trained in zip([hidden, module.weight], trained, strict=True) if is_trained]
    module.weight.requires_grad_(trained[1])
    hidden.requires_grad_(trained[0])
    expected = cross_entropy(module(hidden), label, ignore_index=IGNORED, reduction="sum") / 21
    found = head.LinearHead(with_head(module), torch.float32).total(hidden, label) / 21
    torch.testing.assert_close(found, expected)
    for grad, true in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(grad, true)


def test_a_model_without_its_head_gives_what_the_head_gets() -> None:
    model = random_llama()
    ids = torch.arange(12)[None]
    with head.LinearHead(model, torch.float32).left_out():
        hidden = model(input_ids=ids).logits
    assert hidden.shape == (1, 12, 32)
    torch.testing.assert_close(model(input_ids=ids).logits, model.lm_head(hidden))


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (lambda: random_llama(), True),
        (lambda: random_llama(tie_word_embeddings=True), True),
        (lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=8, vocab_size=64)), False),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2)), False),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)), False),
        (lambda: peft.get_peft_model(random_llama(), peft.LoraConfig(target_modules=["lm_head"])), False),
        (lambda: with_copied_head(), True),
    ],
    ids=["its own", "tied", "with a bias", "capped", "scaled", "adapted", "trained beside"],
)
def test_only_a_head_that_is_the_last_and_linear_is_taken_over(model: Any, taken: bool) -> None:
    assert (fast.linear_head(model(), torch.float32, sharded=False) is not None) == taken


def with_copied_head() -> Any:
    """A model of PEFT that trains a copy of its head, which is not what it was."""
    adapted = peft.get_peft_model(
        random_llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        adapted.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    return adapted


def test_a_head_with_a_trained_copy_is_the_copy_and_without_adapters_the_original() -> None:
    model = with_copied_head()
    linear = fast.linear_head(model, torch.float32, sharded=False)
    assert linear
    ids = torch.arange(12)[None]
    copy = model.get_base_model().lm_head.modules_to_save["default"].weight
    found = []
    for without in (nullcontext(), model.disable_adapter()):
        with without:
            expected = model(input_ids=ids).logits
            with linear.left_out():
                hidden = model(input_ids=ids).logits
            torch.testing.assert_close(linear.logits(hidden), expected)
            found.append(linear.total(hidden[0, :-1], ids[0, 1:]))
            torch.testing.assert_close(found[-1], cross_entropy(expected[0, :-1], ids[0, 1:], reduction="sum"))
    assert found[0] != found[1]
    (grad,) = torch.autograd.grad(found[0], [copy])
    (true,) = torch.autograd.grad(
        cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"), [copy]
    )
    torch.testing.assert_close(grad, true)


def a_batch(lengths: list[int]) -> GlobalBatch:
    """Documents of these lengths, each an example."""
    tokens = cast(Any, SimpleNamespace(lengths=np.array(lengths), targets=np.array(lengths)))
    return GlobalBatch(Examples.of_each(tokens), np.arange(len(lengths)))


def test_micro_batches_of_one_row_are_even_and_hold_all_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 64, 50).tolist()
    layout = Layout(seq_len=64, packing=True, micro_batch=4)
    ranks = [deal_in_one_row(layout, a_batch(lengths), rank, 2) for rank in range(2)]
    micros = [micro for rank in ranks for micro in rank]
    assert [len(rank) for rank in ranks] == [math.ceil(sum(lengths) / 2 / 256)] * 2
    assert all(len(micro.rows) == 1 for micro in micros)
    assert sorted(number for micro in micros for number in micro.rows[0]) == list(range(50))
    filled = [sum(lengths[number] for number in micro.rows[0]) for micro in micros]
    assert max(filled) - min(filled) < min(lengths) + 1
    unpacked = Layout(seq_len=64, packing=False, micro_batch=4)
    assert len(deal_in_one_row(unpacked, a_batch(lengths), 0, 2)) == math.ceil(50 / 4 / 2), (
        "a row each, as memory allows"
    )


def test_documents_that_fill_their_rows_keep_them() -> None:
    layout = Layout(seq_len=64, packing=True, micro_batch=4)
    (first, second) = deal_in_one_row(layout, a_batch([64] * 8), 0, 1)
    assert sorted(first.rows + second.rows) == [[number] for number in range(8)]
    (only,) = deal_in_one_row(layout, a_batch([63, 63]), 0, 1)
    assert only.rows == [[0, 1]], "a row of 63 is padded to 64"
    (nothing,) = deal_in_one_row(layout, a_batch([]), 0, 1)
    assert nothing.rows == []


def test_starts_are_where_positions_begin_anew() -> None:
    position = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert starts_of_documents(position).tolist() == [0, 3, 5, 6, 12]
    assert not len(starts_of_documents(position[1:]))


def test_one_compilation_serves_all_layers_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(layers, "compile_region", count)
    model = adapted_llama().train()
    ids = torch.randint(64, (3, 56))
    plain = [model(input_ids=ids[:, :length]).logits for length in (24, 56, 40)]
    layers.compile_layers(model)
    for length, expected in zip((24, 56, 40), plain, strict=True):
        torch.testing.assert_close(model(input_ids=ids[:, :length]).logits, expected)
    assert len(graphs) <= 2
    layers.uncompile_layers(model)
    assert not any("forward" in vars(layer) for layer in layers.decoder_layers(model))


@pytest.mark.usefixtures("uncompiled")
def test_layers_that_cannot_be_compiled_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(layers.torch, "compile", lambda *_, **__: fail)
    model = adapted_llama().train()
    kernels = fast.make_fast(a_job(kernels="fast"), model, LORA, torch.float32, CPU)
    assert kernels.names == ["losses in chunks"]
    assert kernels.problems == ["losses in chunks, compiled layers: RuntimeError: no compiler here"]


@pytest.mark.usefixtures("uncompiled")
def test_a_fast_path_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head.LinearHead, "losses", lambda _self, hidden, label: 1.01 * hidden.sum(1)[: len(label)])
    model = adapted_llama().train()
    kernels = fast.make_fast(a_job(kernels="fast"), model, LORA, torch.float32, CPU)
    assert not kernels.names
    assert len(kernels.problems) == 2
    assert all("the probe's losses differ by" in problem for problem in kernels.problems)
    assert not any("forward" in vars(layer) for layer in layers.decoder_layers(model))


def test_a_fast_run_is_the_plain_one_and_resumes_bitwise(new_run: Any, cache: Path) -> None:
    plain, whole = (
        new_run(kernels, train={"kernels": kernels, "steps": 6}, checkpoint={"every": 3, "keep": 9})
        for kernels in ("plain", "fast")
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "FLEETUNE_CACHE": str(cache), "TORCHDYNAMO_DISABLE": "1"}

    def train(*runs: Path) -> None:
        subprocess.run([sys.executable, "-m", "trainer", *map(str, runs)], env=environment, check=True)

    train(plain, whole)
    (plan,) = (event for event in events(whole) if event["event"] == "plan")
    assert "losses in chunks" in plan["kernels"]
    assert not plan["kernel_problems"]
    assert difference(curve(whole), curve(plain)) < 1e-6
    again = interrupted(whole, "again", 3)
    train(again)
    assert curve(again, 2) == curve(whole)[3:]
