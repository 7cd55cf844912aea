"""Weights that ZeRO 3 has sharded, made whole for a while; also before there is an engine.

This module is the `methods.base.Gather` of every method that the trainer makes.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def shape(parameter: torch.Tensor) -> torch.Size:
    """The whole shape of a parameter, sharded or not."""
    whole = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(whole)


def gathered(parameters: Iterable[nn.Parameter], modified: bool = False) -> AbstractContextManager[None]:
    """Within it, the parameters are whole on every rank; where they are `modified`, rank 0's values stay.

    A collective over all ranks. Weights that are not sharded are whole already, and keep what each rank writes.
    """
    sharded = list(filter(is_sharded, parameters))
    if not modified:
        sharded = [parameter for parameter in sharded if not is_gathered(parameter)]
    if not sharded:
        return nullcontext()
    import deepspeed

    writer = 0 if modified else None
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)
    return context


@contextmanager
def gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """Within it, a sharded model runs before it has an engine: a module's own weights are whole in its forward pass.

    All ranks must run it together.
    """
    hooks = []
    for module in model.modules():
        of_module = module.parameters(recurse=False)
        sharded = list(filter(is_sharded, of_module))
        if sharded:
            hooks += _gathering_hooks(module, sharded)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 has this parameter in slices; a plain one has no id of DeepSpeed."""
    return hasattr(parameter, "ds_id")


def is_gathered(parameter: Any) -> bool:
    """Whether a sharded parameter is whole at the moment, as a block around this one, or the engine, made it so."""
    status: str = parameter.ds_status.name
    return status == "AVAILABLE"


def slice_of(parameter: Any) -> torch.Tensor:
    """What a rank has of a sharded parameter, 1-D; padded, so that all ranks have as much."""
    held: torch.Tensor = parameter.ds_tensor
    return held


def mark_gathered(parameter: Any, whole: torch.Tensor) -> None:
    """Let a sharded parameter be whole, with these values."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.data = whole
    parameter.ds_status = ZeroParamStatus.AVAILABLE


def mark_released(parameter: Any) -> None:
    """Let a sharded parameter be no more than its slices."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.data = parameter.data.new_empty(0)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _gathering_hooks(module: nn.Module, sharded: list[nn.Parameter]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks by which a module gathers its own parameters before its forward pass, and releases them after it."""
    stack = ExitStack()

    def gather(*_: Any) -> None:
        stack.enter_context(gathered(sharded))

    def release(*_: Any) -> None:
        stack.close()

    before = module.register_forward_pre_hook(gather)
    after = module.register_forward_hook(release)
    return [before, after]
