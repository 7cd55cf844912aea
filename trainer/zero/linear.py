"""Linear layers whose weights stage 3 has sharded: what they keep for the backward pass.

PyTorch's own would keep the weight that was gathered, so that no layer's memory is given back after its forward pass.
DeepSpeed's keeps the input too, also of a frozen weight and before autocast's cast: 7 GiB for LoRA on a base of 1B.
Shapes: N all positions, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear


class ShardedLinear(nn.Linear):
    """A linear layer that keeps its weight as ZeRO has it, and its input only where the weight is trained."""

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b, in autocast's dtype where there is one."""
        product: Tensor = _ProductOfSharded.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


def shard_linears(model: nn.Module, is_to_be_sharded: Callable[[nn.Parameter], bool]) -> None:
    """Make the linear layers of a model whose weights are, or will be, sharded ready for that."""
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        weight = cast(nn.Parameter, module.weight)
        if is_to_be_sharded(weight):
            # A class, and no attribute of the module: what looks for linear layers still finds them.
            module.__class__ = ShardedLinear


class _ProductOfSharded(Function):
    """x Wᵀ + b; W is kept as the parameter itself, which is gathered again when the backward pass comes to it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As it is given, as several layers may be given the same.
        kept = value if weight.requires_grad else None
        ctx.save_for_backward(kept, weight)
        # Cast here, as autocast would keep what it casts until the whole forward pass ends.
        dtype = _dtype_of_product(value)
        same_OI = weight.to(dtype)
        same_O = None if bias is None else bias.to(dtype)
        return linear(value.to(dtype), same_OI, same_O)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        value, weight_OI = ctx.saved_tensors
        to_value, to_weight, to_bias = ctx.needs_input_grad
        dtype = slope.dtype
        slope_NO = slope.flatten(0, -2)
        of_value = None
        if to_value:
            same_OI = weight_OI.to(dtype)
            of_value = slope.matmul(same_OI)
        of_weight = None
        if to_weight:
            same = value.to(dtype)
            value_NI = same.flatten(0, -2)
            of_weight = slope_NO.t().matmul(value_NI)
        of_bias = slope_NO.sum(0) if to_bias else None
        return of_value, of_weight, of_bias


def _dtype_of_product(value: Tensor) -> torch.dtype:
    """In which dtype a linear layer computes: autocast's, or that of its input."""
    kind = value.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return value.dtype
