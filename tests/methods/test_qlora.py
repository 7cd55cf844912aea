"""QLoRA: equal to bitsandbytes with PEFT, the 4-bit base out of ZeRO's hands, and merges that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from alone import attached, llama, logits, losses, optimizer_of, trained
from by_hand import adamw
from finished_runs import curve, difference, interrupted
from llamas import random_llama
from sampling import method_sampled
from transformers import AutoModelForCausalLM

from methods.base import MergeRefused
from methods.options.low_rank import QLora
from methods.parts import quantised

ROOT = Path(__file__).parent.parent.parent
LOFTQ = QLora(rank=4, init="loftq")
# Loads two folders in 4 bits and prints how many bytes of memory the second took, at the most and at the end.
LOADING = """
import sys, threading
import bitsandbytes, torch
from transformers import AutoModelForCausalLM
from methods.parts import quantised

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        seen.append(memory())

options = quantised.load_options("nf4", True, torch.bfloat16)
AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)  # imports what loading needs
before, seen, done = memory(), [], threading.Event()
(thread := threading.Thread(target=watch)).start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16, **options)
done.set()
thread.join()
print(max(seen) - before, memory() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk; two files, as large ones have."""
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path, max_shard_size="60KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


def in_4_bits(folder: Path, options: QLora) -> Any:
    loading = quantised.load_options(options.quant, options.double_quant, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **loading)
    for _, layer in quantised.four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False  # else plain PEFT computes in bf16 on such a CPU
    torch.manual_seed(1)
    return model.train()


def adapted(folder: Path, options: QLora) -> tuple[Any, Any]:
    """The method of these options, and the 4-bit base with it attached."""
    return attached(options, in_4_bits(folder, options))


@pytest.fixture
def loftq(folder: Path, tmp_path: Path) -> tuple[Any, torch.Tensor]:
    """A method whose adapter was trained from LoftQ's start and lies in `tmp_path`, and what its model says."""
    method, model = adapted(folder, LOFTQ)
    losses(model, optimizer_of(method, model, 1e-2))
    method.export(model, trained(model), tmp_path)
    return method, logits(model)


@pytest.mark.parametrize("options", [QLora(rank=4), QLora(rank=4, quant="fp4", double_quant=False, init="gaussian")])
def test_equals_bitsandbytes_with_peft(options: QLora, folder: Path) -> None:
    method, model = adapted(folder, options)
    before = logits(model)
    found = losses(model, optimizer_of(method, model, 1e-2))
    with method.reference(model):
        assert torch.allclose(logits(model), before, atol=1e-6)
    start = "gaussian" if options.init == "gaussian" else True
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start)
    alone = peft.get_peft_model(in_4_bits(folder, options), config)
    assert found == pytest.approx(losses(alone, adamw(alone, lr=1e-2)), rel=1e-5)
    assert found[-2] < found[0] - 0.05


def test_plain_peft_loads_what_was_trained_on_the_4_bit_base(loftq: Any, folder: Path, tmp_path: Path) -> None:
    _, expected = loftq
    loaded = peft.PeftModel.from_pretrained(in_4_bits(folder, LOFTQ), tmp_path)
    assert (logits(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_loftq_merges_into_what_it_was_made_for(loftq: Any, tmp_path: Path) -> None:
    method, expected = loftq
    merged = method.merge(peft.PeftModel.from_pretrained(llama(), tmp_path))
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_evaluation_leaves_training_as_it_was(folder: Path) -> None:
    method, model = adapted(folder, QLora(rank=4))
    expected = losses(model, optimizer_of(method, model, 1e-2))
    method, model = adapted(folder, QLora(rank=4))
    found = losses(model, optimizer_of(method, model, 1e-2), after=lambda: logits(model))
    assert found == expected


def test_loftq_restores_what_rank_r_can(folder: Path) -> None:
    _, model = adapted(folder, LOFTQ)
    originals = {name: p.detach() for name, p in llama().named_parameters()}
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        lost = originals[name.removeprefix("base_model.model.") + ".weight"] - quantised.dequantised(layer.weight)
        update = layer.get_delta_weight("default").detach()
        S = torch.linalg.svdvals(lost)
        assert torch.linalg.matrix_norm(lost - update).item() == pytest.approx(
            float((S[4:] ** 2).sum().sqrt()), rel=1e-3
        )


def test_4_bit_weights_are_no_parameters(folder: Path) -> None:
    _, model = adapted(folder, QLora(rank=4))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    packed = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.uint8]
    assert len(packed) == 14


@pytest.mark.matrix
def test_a_base_is_never_whole_in_memory_before_it_is_in_4_bits(folder: Path, tmp_path: Path) -> None:
    base = random_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6).bfloat16()
    whole = 2 * sum(p.numel() for p in base.parameters())
    base.save_pretrained(tmp_path, max_shard_size="60MB")
    del base
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed is gone
    command = [sys.executable, "-c", LOADING, folder, tmp_path]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, held = map(int, found.stdout.split()[-2:])
    assert 0.25 * whole < held < 0.35 * whole
    assert peak < 0.75 * whole, "held, and what one matrix takes"


def test_a_merge_reports_and_refuses(folder: Path, tmp_path: Path) -> None:
    method, model = adapted(folder, QLora(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    method.export(model, trained(model), tmp_path / "large")
    merged = method.merge(peft.PeftModel.from_pretrained(llama(), tmp_path / "large"))
    assert len(method.merge_report) == 14
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    ratio = method.merge_report["base_model.model." + q_proj.removesuffix(".weight")]
    update = merged.get_parameter(q_proj) - llama().get_parameter(q_proj)
    lost = quantised.quantisation_error(llama().get_parameter(q_proj).detach(), "nf4", True)
    assert ratio == pytest.approx((lost.norm() / update.norm()).item(), rel=1e-4)
    small = {name: value * (1e-4 if "lora_B" in name else 1) for name, value in trained(model).items()}
    method.export(model, small, tmp_path / "small")
    with pytest.raises(MergeRefused, match="times as much as training"):
        method.merge(peft.PeftModel.from_pretrained(llama(), tmp_path / "small"))


@pytest.mark.parametrize("stages", method_sampled("qlora", [2, 3]))
def test_layouts_agree_resume_is_exact_and_a_refusal_keeps_the_adapter(
    stages: list[int], new_run: Any, launch: Any
) -> None:
    runs = {
        (start, zero): new_run(
            f"{start}-{zero}",
            method={"kind": "qlora", "rank": 4, "init": start},
            sharding={"zero": zero},
            train={"lr": 2e-3 if start == "loftq" else 1e-6, "micro_batch": 1 + zero},
            data={"packing": zero == 3},
            checkpoint={"every": 5},
            output={"merge": start == "default"},
        )
        for start, zero in (("default", 1), ("loftq", 0), *(("loftq", zero) for zero in stages))
    }
    launch(2, *runs.values())
    worst = {key: difference(curve(run), curve(runs["loftq", 0])) for key, run in runs.items() if key[0] == "loftq"}
    assert max(worst.values()) < 1e-6, worst
    whole = runs["loftq", stages[-1]]
    again = interrupted(whole, "again", 5)
    launch(2, again)
    assert curve(again, 2) == curve(whole)[5:]
    refused = runs["default", 1] / "output"
    assert (refused / "adapter_model.safetensors").exists()
    assert not (refused / "merged").exists()
    assert max(json.loads((refused / "merge_report.json").read_text()).values()) > 10
    assert "merge_refused" in (runs["default", 1] / "attempts/1/events.jsonl").read_text()
