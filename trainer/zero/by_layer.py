"""Stage 3 by decoder layers: each is gathered at once, instead of each small module of it when its turn comes.

A model with LoRA has some twenty modules with weights in a layer. DeepSpeed hooks each of them four times, and looks
for what to gather and to release in each hook; with a layer as its unit (a leaf, in its words) that is done once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from methods.base import Keywords
from trainer.zero.gather import gathered, is_sharded, shape

LIVE = 10**9  # elements that DeepSpeed lets stay gathered (stage3_max_live_parameters)
Positional = tuple[Any, ...]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a base of transformers, those that it would checkpoint."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module


def largest_layer(model: nn.Module) -> int:
    """The elements of the largest decoder layer, which are gathered at once.

    It is 0 where a model has no such layers, where one is larger than what may be gathered, or where they share
    weights: their gradients are complete only when the last of these layers had its backward pass.
    """
    seen: set[nn.Parameter] = set()
    largest = 0
    for layer in decoder_layers(model):
        elements = 0
        for parameter in layer.parameters():
            if parameter in seen:
                return 0
            seen.add(parameter)
            elements += shape(parameter).numel()
        largest = max(largest, elements)
    return largest if largest <= LIVE else 0


def gather_by_layer(model: nn.Module) -> int:
    """Have an engine that is made of this model gather by decoder layers; gives the elements of the largest one.

    Where that is 0, all is gathered module by module.
    """
    from deepspeed.utils import set_z3_leaf_modules

    largest = largest_layer(model)
    if largest:
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(with_gradient, with_kwargs=True)
        set_z3_leaf_modules(model, [GradientCheckpointingLayer])
    return largest


@contextmanager
def whole_in_part(model: nn.Module) -> Iterator[None]:
    """Within it, a sharded model that has no engine yet is whole, but of its decoder layers it has the first alone.

    They are as many as it takes to have each kind of layer, and two at least. A collective over all ranks. A model
    that is not sharded stays as it is.
    """
    sharded = any(map(is_sharded, model.parameters()))
    if not sharded:
        yield
        return
    whole = list(_lists_of_layers(model))
    try:
        for parent, name, layers in whole:
            count = _first_of_each_kind(layers)
            setattr(parent, name, layers[:count])
        with gathered(model.parameters()):
            yield
    finally:
        for parent, name, layers in whole:
            setattr(parent, name, layers)


def _lists_of_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """The lists of decoder layers in a model, with the module that has each, and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if not isinstance(child, nn.ModuleList):
                continue
            if any(isinstance(layer, GradientCheckpointingLayer) for layer in child):
                yield parent, name, child


def _first_of_each_kind(layers: nn.ModuleList) -> int:
    """How many layers, from the first on, have all kinds among them."""
    kinds = []
    for layer in layers:
        attention = getattr(layer, "attention_type", None)
        kinds.append((type(layer), attention))
    count = 2
    for kind in set(kinds):
        first = kinds.index(kind)
        count = max(count, first + 1)
    return count


def with_gradient(_: nn.Module, values: Positional, named: Keywords) -> tuple[Positional, Keywords]:
    """What a layer is given, its hidden states first and with a gradient.

    DeepSpeed reduces a layer's gradients, and releases its weights, when the gradient of its first argument is there;
    the first layer of a frozen base would have none.
    """
    if not values:
        values = (named.pop("hidden_states"),)
    hidden, *others = values
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return (hidden, *others), named
