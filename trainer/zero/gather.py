"""Weights that ZeRO 3 has sharded, made whole for a while; also before there is an engine.

This module is the `methods.base.Gather` of every method that the trainer makes.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Iterable[nn.Parameter], modified: bool = False) -> AbstractContextManager[None]:
    """Within it, the parameters are whole on every rank; where they are `modified`, rank 0's values stay.

    A collective over all ranks. Weights that are not sharded are whole already, and keep what each rank writes.
    """
    sharded = [parameter for parameter in parameters if _is_sharded(parameter)]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=0 if modified else None
    )
    return context


@contextmanager
def gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """Within it, a sharded model runs before it has an engine: a module's own weights are whole in its forward pass.

    All ranks must run it together.
    """
    hooks = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if _is_sharded(parameter)]
        if own:
            hooks += _hooks(module, own)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter, sharded or not, before the engine exists; at stage 3 every rank calls it."""
    parameter = model.get_parameter(name)
    with torch.no_grad(), gathered([parameter], modified=True):
        if not _is_sharded(parameter) or dist.get_rank() == 0:
            parameter.copy_(value.view(parameter.shape).to(parameter.device))


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _hooks(module: nn.Module, own: list[nn.Parameter]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks by which a module gathers its own parameters before its forward pass, and releases them after it."""
    stack = ExitStack()

    def gather(*_: Any) -> None:
        stack.enter_context(gathered(own))

    def release(*_: Any) -> None:
        stack.close()

    return [module.register_forward_pre_hook(gather), module.register_forward_hook(release)]
