"""Decoder layers, each compiled as a region of its own: fused small operations, and few launches.

What is around them stays as it is, as transformers makes a mask wherever the mask decision itself is compiled. All
layers share one compilation, whatever the lengths of rows. Evaluation and generation are left alone.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from runfolder.folders import cache

Forward = Callable[..., Any]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a base of transformers, those that it would checkpoint."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer for passes that train; what was compiled is kept beside tokenised data."""
    folder = cache() / "kernels"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    for layer in decoder_layers(model):
        layer.forward = _in_training(layer, layer.forward)


def uncompile_layers(model: nn.Module) -> None:
    """Leave decoder layers as they were before `compile_layers`."""
    for layer in decoder_layers(model):
        if "forward" in vars(layer):
            del layer.forward


def _in_training(layer: nn.Module, forward: Forward) -> Forward:
    """A layer's forward pass, compiled where it is for training."""
    compiled = torch.compile(forward, dynamic=True)

    def choose(*args: Any, **kwargs: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return compiled(*args, **kwargs)
        return forward(*args, **kwargs)

    return choose
