"""DoRA with norms from its factors, as on the fast path, is PEFT's."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from llamas import loss_and_gradients, move_from_start, random_llama
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from methods.base import Setup
from methods.dora import DoraTuning
from methods.options.low_rank import Dora

IDS = torch.arange(24).reshape(2, 12)


def attached(dropout: float, **base: Any) -> tuple[DoraTuning, nn.Module]:
    """The method, and a small model with adapters and magnitudes away from their start."""
    method = DoraTuning(Dora(rank=4, dropout=dropout), Setup())
    torch.manual_seed(0)
    model = method.attach(random_llama(**base))
    move_from_start(model)
    return method, model.train()


@pytest.mark.parametrize(
    ("dropout", "base"),
    [(0.0, {}), (0.2, {}), (0.0, {"attention_bias": True, "mlp_bias": True}), (0.2, {"mlp_bias": True})],
    ids=["plain", "dropout", "bias", "dropout and bias"],
)
def test_norms_from_factors_are_those_of_the_sum(dropout: float, base: dict[str, Any]) -> None:
    method, model = attached(dropout, **base)
    expected = loss_and_gradients(model, IDS)
    with ExitStack() as undo:
        method.speed_up(model, undo)
        found = loss_and_gradients(model, IDS)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    back = loss_and_gradients(model, IDS)
    for name, value in expected.items():
        assert torch.equal(back[name], value), "undone, it is PEFT's again"


def test_norms_follow_the_factors() -> None:
    method, model = attached(0.0)
    _, plain = attached(0.0)
    method.speed_up(model, ExitStack())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            step = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += step
            plain.get_parameter(name).data += step
    expected = loss_and_gradients(plain, IDS)
    found = loss_and_gradients(model, IDS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    ids = {"input_ids": IDS[:1, :4], "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.eval().generate(**ids), plain.eval().generate(**ids))


def test_layers_share_one_graph() -> None:
    method, model = attached(0.0)
    method.speed_up(model, ExitStack())
    graphs = []

    def backend(region: Any, inputs: Any) -> Any:  # noqa: ARG001
        graphs.append(region)
        return region.forward

    torch._dynamo.reset()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) > 1
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    hidden_BTD = torch.randn(1, IDS.shape[1], model.config.hidden_size, requires_grad=True)
    head = model.config.hidden_size // model.config.num_attention_heads
    turn = torch.ones(1, IDS.shape[1], head)
    for layer in layers:
        layer(hidden_BTD, position_embeddings=(turn, turn))
    assert len(graphs) == 1
