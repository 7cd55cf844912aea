"""What lies between the adapters of a gated MLP becomes one operation, and computes what it did."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from llamas import loss_and_gradients, move_from_start, random_llama
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from methods.adalora import AdaLoraTuning
from methods.base import Setup
from methods.dora import DoraTuning
from methods.lora import LoraTuning
from methods.options.low_rank import AdaLora, Dora, Lora
from trainer.kernels.fused_gates import fuse_gates
from trainer.kernels.gate import Sides, gated, gated_backward
from trainer.kernels.layers import decoder_layers
from trainer.kernels.shared_products import share_products

IDS = torch.arange(24).reshape(2, 12)
OPERATION = torch.ops.fleetune.gated.default


def adapted(kind: str, base: dict[str, Any], **options: Any) -> nn.Module:
    """A small model in training with adapters that are not zero, made fast as the method makes it."""
    torch.manual_seed(0)
    method: Any
    if kind == "adalora":
        method = AdaLoraTuning(AdaLora(rank=3, initial_rank=5), Setup())
    elif kind == "dora":
        method = DoraTuning(Dora(**({"rank": 4} | options)), Setup())
    else:
        method = LoraTuning(Lora(**({"rank": 4} | options)), Setup())
    model = method.attach(random_llama(**base))
    move_from_start(model)
    method.speed_up(model, ExitStack())
    return model.train()


def operations(model: nn.Module) -> list[int]:
    """Compile a model's layers with fused gates, without code generation; gives how many operations each one has."""
    counts = []

    def backend(region: GraphModule, inputs: list[Any]) -> Any:
        share_products(region.graph)
        fuse_gates(region.graph)
        region.graph.lint()
        region.recompile()
        counts.append(sum(node.target is OPERATION for node in region.graph.nodes))
        return aot_module_simplified(region, inputs, fw_compiler=lambda graph, _: graph.forward)

    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend)
    return counts


@pytest.mark.parametrize(
    ("kind", "options", "base"),
    [
        ("lora", {}, {}),
        ("lora", {"dropout": 0.2}, {}),
        ("lora", {"target": ["gate_proj", "up_proj"]}, {}),
        ("lora", {}, {"mlp_bias": True}),
        ("dora", {}, {}),
        ("adalora", {}, {}),
    ],
    ids=["lora", "dropout", "no adapter follows", "bias", "dora", "adalora"],
)
def test_a_fused_gate_computes_what_it_did(kind: str, options: dict[str, Any], base: dict[str, Any]) -> None:
    expected = loss_and_gradients(adapted(kind, base, **options), IDS)
    model = adapted(kind, base, **options)
    counts = operations(model)
    values = loss_and_gradients(model, IDS)
    assert set(counts) == {1}
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=2e-4, atol=1e-5)


def test_a_base_in_4_bits_has_fused_gates_too(tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=in_4_bits)
    model = peft.get_peft_model(base, config).train()
    expected = loss_and_gradients(model, IDS)
    counts = operations(model)
    values = loss_and_gradients(model, IDS)
    assert set(counts) == {1}
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {"target": ["gate_proj", "down_proj"]}),
        ("lora", {"target": ["up_proj"]}),
        ("lora", {"rank": 80}),
        ("dora", {"dropout": 0.2}),
    ],
    ids=["gate alone", "up alone", "a large rank", "another base of dropped inputs"],
)
def test_what_is_another_sum_is_left(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, {}, **options)
    counts = operations(model)
    expected = loss_and_gradients(adapted(kind, {}, **options), IDS)
    values = loss_and_gradients(model, IDS)
    assert set(counts) == {0}
    torch.testing.assert_close(values["loss"], expected["loss"])


@pytest.mark.parametrize("shares", [False, True])
def test_slopes_are_those_of_autograd(shares: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 12), (2, 5, 12), (2, 5, 3), (2, 5, 4), (12, 3), (12, 4)] + [(12,), (12,)] * shares
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    following = torch.randn(2, 12, generator=generator, requires_grad=True)
    sides = Sides(*tensors)
    gate = sides.gate + sides.narrow_gate @ sides.wide_gate.T
    up = sides.up + sides.narrow_up @ sides.wide_up.T
    if sides.share_gate is not None:
        gate, up = gate * sides.share_gate, up * sides.share_up
    hidden = nn.functional.silu(gate) * up
    weight = torch.randn(hidden.shape, generator=generator)
    expected = torch.autograd.grad(
        (hidden * weight).sum() + (hidden @ following.T).sin().sum(), [*tensors, following]
    )
    again, narrow = gated(tensors, following)
    slopes = torch.autograd.grad((again * weight).sum() + narrow.sin().sum(), [*tensors, following])
    torch.testing.assert_close(again, hidden)
    torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "ranks", "following", "shares"),
    [
        (140, 200, (4, 4), 4, False),
        (140, 200, (16, 8), 32, True),
        (6, 128, (5, 16), 1, True),
        (258, 260, (40, 64), 0, False),
        (800, 130, (16, 16), 16, True),
    ],
)
def test_kernels_compute_what_the_operation_says(
    tokens: int, outputs: int, ranks: tuple[int, int], following: int, shares: bool, dtype: torch.dtype
) -> None:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    torch.manual_seed(0)
    narrow = drawn(1, tokens, sum(ranks)).split(ranks, -1)  # rows lie apart
    tensors = [drawn(1, tokens, outputs), drawn(1, tokens, outputs), *narrow, *(drawn(outputs, r) for r in ranks)]
    tensors += [torch.rand(outputs, device="cuda") + 0.5 for _ in range(2)] * shares
    weight = drawn(following, outputs) if following else None
    slopes = [drawn(1, tokens, outputs), drawn(1, tokens, following) if following else None]
    on_cpu = [tensor.cpu() for tensor in tensors]
    weight_on_cpu = None if weight is None else weight.cpu()
    expected = [gated(on_cpu, None)[0]]
    expected += gated_backward(*(None if s is None else s.cpu() for s in slopes), on_cpu, weight_on_cpu)
    values = [gated(tensors, None)[0], *gated_backward(*slopes, tensors, weight)]
    for value, truth in zip(values, expected, strict=True):
        gap = (value.cpu().float() - truth.float()).norm() / truth.float().norm()
        assert gap < (1e-5 if dtype == torch.float32 else 1e-3)
