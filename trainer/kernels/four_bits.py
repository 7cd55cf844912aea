"""Linear layers whose base is in 4 bits: each weight is made whole for its product, forward and backward, at once.

bitsandbytes makes a weight whole in three steps, each a pass over memory: the constants of its blocks from their 8
bits, their offset, and the numbers. Here it is one, and a compiled layer sees nothing of it but the product.
The numbers are the same, bit for bit. Nothing of what was made is kept for the backward pass.

Shapes: O outputs, I inputs, L levels of 4 bits (16), S blocks of a weight.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from methods.parts.quantised import four_bit_layers

NAME_OF_PART = "four_bits_"  # begins the names of a layer's buffers


class FourBits(NamedTuple):
    """What a weight in 4 bits is made of: bytes with two numbers each, whose first is in the upper half."""

    packed: Tensor  # uint8, of the weight as one row
    level_L: Tensor  # what 4 bits stand for, fp32
    scale_S: Tensor  # what a block is multiplied by: fp32, or in 8 bits with the three that follow
    level_of_scale: Tensor | None = None  # what 8 bits stand for, fp32 [256]
    group_scale: Tensor | None = None  # what a group of scales is multiplied by, fp32
    offset: Tensor | None = None  # what is added to each scale, fp32 []


class FourBitSizes(NamedTuple):
    """A weight's outputs and inputs, the numbers of a block of it, and the blocks of a group (0: no groups)."""

    outputs: int
    inputs: int
    block: int
    group: int


class FourBitLinear(Linear4bit):
    """A linear layer in 4 bits that computes as above; an instance is made of one of bitsandbytes."""

    sizes: FourBitSizes
    names: list[str]  # of the buffers that are the parts of its weight

    def forward(self, value: Tensor) -> Tensor:
        """What the layer gives [..., O] for an input [..., I], in the input's dtype."""
        dtype = self.compute_dtype or value.dtype
        parts = [getattr(self, name) for name in self.names]
        cast = value
        if dtype != value.dtype:
            cast = value.to(dtype)
        product: Tensor = product_in_4_bits(cast, parts, list(self.sizes))
        if self.bias is not None:
            product = product + self.bias.to(dtype)
        if dtype != value.dtype:
            product = product.to(value.dtype)
        return product


def make_whole_at_once(model: nn.Module, undo: ExitStack) -> None:
    """Let the layers of a model that are in 4 bits compute so, and `undo` what takes that back."""
    for _, layer in four_bit_layers(model):
        parts, layer.sizes = four_bits_of(layer.weight)
        layer.names = []
        for field, part in parts._asdict().items():
            if part is not None:
                name = NAME_OF_PART + field
                layer.names.append(name)
                layer.register_buffer(name, part, persistent=False)
        undo.callback(_restore, layer, type(layer))
        layer.__class__ = FourBitLinear  # a method of a class, as layers share one compilation


def _restore(layer: FourBitLinear, kind: type) -> None:
    """Make a layer what it was."""
    for name in layer.names:
        delattr(layer, name)
    del layer.names, layer.sizes
    layer.__class__ = kind


def four_bits_of(weight: Any) -> tuple[FourBits, FourBitSizes]:
    """What a weight of bitsandbytes is made of: the same memory."""
    state = weight.quant_state
    outputs, inputs = state.shape
    plain = weight.data.as_subclass(Tensor)
    packed = plain.view(-1)
    packed = packed.view(torch.uint8)
    if not state.nested:
        parts = FourBits(packed, state.code, state.absmax)
        sizes = FourBitSizes(outputs, inputs, state.blocksize, group=0)
        return parts, sizes
    group = state.state2
    of_groups = (group.code, group.absmax, state.offset)
    parts = FourBits(packed, state.code, state.absmax, *of_groups)
    sizes = FourBitSizes(outputs, inputs, state.blocksize, group.blocksize)
    return parts, sizes


def whole_weight(parts: FourBits, sizes: FourBitSizes, dtype: torch.dtype) -> Tensor:
    """A weight [O, I] from its parts."""
    if parts.packed.is_cuda:
        from trainer.kernels import four_bit_kernels

        return four_bit_kernels.made_whole(parts, sizes, dtype)
    numbers = sizes.outputs * sizes.inputs
    upper = parts.packed >> 4
    lower = parts.packed & 15
    four_bits = torch.stack([upper, lower], dim=1)
    four_bits = four_bits.flatten()[:numbers]
    level = parts.level_L[four_bits.int()]
    scale_S = _scales(parts, sizes)
    scale = scale_S.repeat_interleave(sizes.block)
    number = level * scale[:numbers]
    shape = (sizes.outputs, sizes.inputs)
    return number.to(dtype).view(shape)


def _scales(parts: FourBits, sizes: FourBitSizes) -> Tensor:
    """What each block is multiplied by, fp32 [S]."""
    if parts.level_of_scale is None:
        return parts.scale_S
    assert parts.group_scale is not None
    assert parts.offset is not None
    level_S = parts.level_of_scale[parts.scale_S.int()]
    of_group = parts.group_scale.repeat_interleave(sizes.group)
    of_group_S = of_group[: len(level_S)]
    scale_S = level_S * of_group_S
    return scale_S + parts.offset


@torch.library.custom_op("fleetune::product_in_4_bits", mutates_args=())
def product_in_4_bits(value: Tensor, parts: list[Tensor], sizes: list[int]) -> Tensor:
    """The product [..., O] of a value [..., I] with a weight in 4 bits, which gets no gradient."""
    of_weight = FourBits(*parts)
    of_sizes = FourBitSizes(*sizes)
    weight_OI = whole_weight(of_weight, of_sizes, value.dtype)
    return value @ weight_OI.T


@product_in_4_bits.register_fake
def _like_product(value: Tensor, _parts: list[Tensor], sizes: list[int]) -> Tensor:
    outputs = sizes[0]
    lengths = value.shape[:-1]
    return value.new_empty(*lengths, outputs)


@torch.library.custom_op("fleetune::product_in_4_bits_backward", mutates_args=())
def product_in_4_bits_backward(slope: Tensor, parts: list[Tensor], sizes: list[int]) -> Tensor:
    """The gradient [..., I] of the value."""
    of_weight = FourBits(*parts)
    of_sizes = FourBitSizes(*sizes)
    weight_OI = whole_weight(of_weight, of_sizes, slope.dtype)
    return slope @ weight_OI


@product_in_4_bits_backward.register_fake
def _like_value(slope: Tensor, _parts: list[Tensor], sizes: list[int]) -> Tensor:
    inputs = sizes[1]
    lengths = slope.shape[:-1]
    return slope.new_empty(*lengths, inputs)


def _keep_parts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, parts, ctx.sizes = inputs
    ctx.save_for_backward(*parts)


def _product_backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    gradient = product_in_4_bits_backward(slope, parts, ctx.sizes)
    of_parts = [None] * len(parts)
    return gradient, of_parts, None


product_in_4_bits.register_autograd(_product_backward, setup_context=_keep_parts)
