"""Products of one input become one, and compute what they did."""

from contextlib import ExitStack
from typing import Any

import peft
import pytest
import torch
from llamas import loss_and_gradients, move_from_start, random_llama
from torch import nn
from torch.fx import GraphModule
from torch.nn.functional import linear

from methods.adalora import AdaLoraTuning
from methods.base import Setup
from methods.options.low_rank import AdaLora
from trainer.kernels.shared_products import share_products
from trainer.zero.by_layer import decoder_layers

SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
IDS = torch.arange(24).reshape(2, 12)


def adapted(**options: Any) -> nn.Module:
    """A small model with adapters that are not zero, in training."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    torch.manual_seed(0)
    model: nn.Module = peft.get_peft_model(random_llama(), config)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of one pass."""
    torch.manual_seed(1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def products_saved(model: nn.Module) -> list[int]:
    """Compile a model's layers with shared products, without code generation; gives how many each layer saves."""
    saved = []

    def backend(region: GraphModule, inputs: list[Any]) -> Any:  # noqa: ARG001
        before = count(region)
        share_products(region.graph)
        region.recompile()
        saved.append(before - count(region))
        return region.forward

    def count(region: GraphModule) -> int:
        return sum(node.target is linear for node in region.graph.nodes)

    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend)
    return saved


def test_what_lies_side_by_side_shares_a_product() -> None:
    expected = gradients(adapted())
    model = adapted()
    saved = products_saved(model)
    found = gradients(model)
    assert set(saved) == {3}, "two of query, key and value, one of gate and up"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.5}, {"rank_pattern": dict.fromkeys(SIDE_BY_SIDE, 16)}],
    ids=["other dropout for each", "wide"],
)
def test_what_is_not_the_same_product_stays(options: dict[str, Any]) -> None:
    model = adapted(**options)
    saved = products_saved(model)
    gradients(model)
    assert set(saved) == {0}


def test_what_differs_in_rank_shares_a_product_too() -> None:
    options = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    expected = gradients(adapted(**options))
    model = adapted(**options)
    saved = products_saved(model)
    found = gradients(model)
    assert set(saved) == {3}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_adalora_computes_what_peft_s_does_and_shares_products() -> None:
    torch.manual_seed(0)
    method = AdaLoraTuning(AdaLora(rank=3, initial_rank=5), Setup())  # a rank that products are slow with
    model = method.attach(random_llama()).train()
    move_from_start(model)
    expected = loss_and_gradients(model, IDS)
    with ExitStack() as undo:
        method.speed_up(model, undo)
        saved = products_saved(model)
        found = loss_and_gradients(model, IDS)
        assert set(saved) == {3}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    for layer in decoder_layers(model):
        del layer.forward
    back = loss_and_gradients(model, IDS)
    for name, value in expected.items():
        assert torch.equal(back[name], value), "undone, it is PEFT's again"
