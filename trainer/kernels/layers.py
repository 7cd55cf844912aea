"""Decoder layers, each compiled as a region of its own: fused small operations, and few launches.

What is around them stays as it is, as transformers makes a mask wherever the mask decision itself is compiled. All
layers share one compilation, whatever the lengths of rows: so the first one too computes the gradient of its input.
Evaluation and generation are left alone.
"""

import os
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.fx import GraphModule

from runfolder.folders import cache
from trainer.kernels.fused_gates import fuse_gates
from trainer.kernels.shared_products import drop_copies, share_products
from trainer.zero.by_layer import decoder_layers

LayerPass = Callable[..., Any]
# By the number of dimensions, those that are numbers of positions or documents: starts, ids, hidden states, masks.
LENGTHS: Mapping[int, tuple[int, ...]] = {1: (0,), 2: (1,), 3: (1,), 4: (2, 3)}


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer for passes that train; what was compiled is kept beside tokenised data."""
    folder = cache() / "kernels"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Kernels are chosen by rules, not by a race: a run that goes on elsewhere computes the same bits.
    inductor.deterministic = True
    # Small operations that do not depend on each other, as casts of adapters' weights, are launched together.
    inductor.combo_kernels = torch.cuda.is_available()
    for layer in decoder_layers(model):
        layer.forward = _in_training(layer, layer.forward)


def uncompile_layers(model: nn.Module) -> None:
    """Leave decoder layers as they were before `compile_layers`."""
    for layer in decoder_layers(model):
        own = vars(layer)
        if "forward" in own:
            del layer.forward


def _in_training(layer: nn.Module, forward: LayerPass) -> LayerPass:
    """A layer's forward pass, compiled where it is for training."""
    compiled = torch.compile(forward, backend=compile_region)

    def choose(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run what was compiled, or the layer as it is."""
        in_training = layer.training and torch.is_grad_enabled()
        if not in_training:
            return forward(hidden, *args, **kwargs)
        if not hidden.requires_grad:
            hidden = hidden.detach()
            hidden.requires_grad_()
        values = chain([hidden], args, kwargs.values())
        for value in values:
            _mark_lengths(value)
        return compiled(hidden, *args, **kwargs)

    return choose


def compile_region(region: GraphModule, inputs: list[Any]) -> LayerPass:
    """A backend of `torch.compile`: PyTorch's own, on a graph in which what adapters do takes fewer passes."""
    from torch._inductor.compile_fx import compile_fx

    drop_copies(region.graph)
    share_products(region.graph)
    fuse_gates(region.graph)
    region.recompile()
    # Inputs of narrow products, like norms, are made again in the backward pass: less memory for 1 % of the time.
    with functorch.patch(ban_recompute_materialized_backward=False):
        compiled: LayerPass = compile_fx(region, inputs)
    return compiled


def _mark_lengths(value: Any) -> None:
    """Say of what a layer is given that its number of positions, or of documents, differs from pass to pass."""
    if isinstance(value, tuple):
        for part in value:
            _mark_lengths(part)
    if not isinstance(value, torch.Tensor):
        return
    dimensions = LENGTHS.get(value.dim(), ())
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(value, dimension)
