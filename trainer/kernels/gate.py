"""The activation of a gated MLP between adapters of low rank, silu(gate) * up, in one pass over memory each way.

Gate and up are outputs of linear layers to which an adapter adds: y = m (W x + s B A x), with DoRA's share m of each
output, elsewhere 1. What this gives is not kept for the backward pass, which makes it again; so the product of the
next adapter, the only other one that needs it there, is a part of it.

Shapes: B rows, T positions, F outputs of gate and up, R rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

LARGEST_GATE_RANK = 64  # that the kernels take


class Sides(NamedTuple):
    """What gate and up are made of; both have shares, or none."""

    gate: Tensor  # what the base gives [B, T, F]
    up: Tensor
    narrow_gate: Tensor  # s A x [B, T, R]
    narrow_up: Tensor
    wide_gate: Tensor  # B [F, R]
    wide_up: Tensor
    share_gate: Tensor | None = None  # m [F], fp32
    share_up: Tensor | None = None


@torch.library.custom_op("fleetune::gated", mutates_args=())
def gated(tensors: list[Tensor], following: Tensor | None) -> tuple[Tensor, Tensor]:
    """The activation [B, T, F] of the tensors of `Sides`, and its product [B, T, R] with `following` [R, F].

    That is the next adapter's weight A; without one, the product is empty. Shares are left out where there are none.
    """
    sides = Sides(*tensors)
    if sides.gate.is_cuda:
        from trainer.kernels import gate_kernels

        hidden = gate_kernels.gated_forward(sides)
    else:
        gate_sum, up_sum = _sums(sides)
        gate_value = _with_share(gate_sum, sides.share_gate)
        up_value = _with_share(up_sum, sides.share_up)
        fp32 = silu(gate_value) * up_value
        hidden = fp32.to(sides.gate.dtype)
    if following is None:
        return hidden, hidden.new_empty(0)
    return hidden, linear(hidden, following)


@gated.register_fake
def _gated_shapes(tensors: list[Tensor], following: Tensor | None) -> tuple[Tensor, Tensor]:
    hidden = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if following is None:
        return hidden, hidden.new_empty(0)
    *lengths, _ = hidden.shape
    rank = len(following)
    return hidden, hidden.new_empty(*lengths, rank)


def _sums(sides: Sides) -> tuple[Tensor, Tensor]:
    """base + B a of gate and up, fp32."""
    gate = (sides.gate, sides.narrow_gate, sides.wide_gate)
    up = (sides.up, sides.narrow_up, sides.wide_up)
    gate_sum = _sum(*gate)
    up_sum = _sum(*up)
    return gate_sum, up_sum


def _sum(base: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """base + B a, fp32."""
    narrow = narrow.float()
    wide = wide.float()
    update = linear(narrow, wide)
    return base.float() + update


def _with_share(value: Tensor, share: Tensor | None) -> Tensor:
    """A value times each output's share, where there are shares."""
    if share is None:
        return value
    return share * value


def _slope_of_share(slope: Tensor, value: Tensor) -> Tensor:
    """The gradient [F] of a share that a value [B, T, F] was multiplied by."""
    product = slope * value
    return product.flatten(0, -2).sum(0)


@torch.library.custom_op("fleetune::gated_backward", mutates_args=())
def gated_backward(
    slope: Tensor,
    slope_following: Tensor | None,
    tensors: list[Tensor],
    following: Tensor | None,
) -> list[Tensor]:
    """The gradients of gate and up, the activation again, and the gradients of the shares, where there are any."""
    sides = Sides(*tensors)
    if slope.is_cuda:
        from trainer.kernels import gate_kernels

        return gate_kernels.gated_slopes(slope, slope_following, sides, following)
    to_hidden = slope.float()
    if slope_following is not None and following is not None:
        to_hidden = to_hidden + slope_following.float() @ following.float()
    gate_sum, up_sum = _sums(sides)
    gate_value = _with_share(gate_sum, sides.share_gate)
    up_value = _with_share(up_sum, sides.share_up)
    sigmoid = gate_value.sigmoid()
    activated = gate_value * sigmoid
    bend = sigmoid + activated * (1 - sigmoid)
    to_gate = to_hidden * up_value * bend
    to_up = to_hidden * activated
    slope_gate = _with_share(to_gate, sides.share_gate)
    slope_up = _with_share(to_up, sides.share_up)
    hidden = activated * up_value
    found = []
    for fp32 in (slope_gate, slope_up, hidden):
        rounded = fp32.to(slope.dtype)
        found.append(rounded)
    if sides.share_gate is not None:
        found.append(_slope_of_share(to_gate, gate_sum))
        found.append(_slope_of_share(to_up, up_sum))
    return found


@gated_backward.register_fake
def _slope_shapes(
    _slope: Tensor,
    _slope_following: Tensor | None,
    tensors: list[Tensor],
    _following: Tensor | None,
) -> list[Tensor]:
    sides = Sides(*tensors)
    like = [sides.gate, sides.up, sides.gate]
    if sides.share_gate is not None and sides.share_up is not None:
        like += [sides.share_gate, sides.share_up]
    slopes = []
    for tensor in like:
        slopes.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    return slopes


def _keep_inputs(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    tensors, following = inputs
    ctx.save_for_backward(*tensors, following)


def _input_slopes(ctx: Any, slope: Tensor, slope_following: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of all inputs; those of narrow products and weights are products of the operation's slopes."""
    *tensors, following = ctx.saved_tensors
    sides = Sides(*tensors)
    if following is None:
        slope_following = None
    slope_gate, slope_up, hidden, *slopes_of_shares = gated_backward(slope, slope_following, tensors, following)
    slope_narrow_gate = slope_gate @ sides.wide_gate
    slope_narrow_up = slope_up @ sides.wide_up
    slope_wide_gate = _slope_of_weight(slope_gate, sides.narrow_gate)
    slope_wide_up = _slope_of_weight(slope_up, sides.narrow_up)
    slopes = [
        slope_gate,
        slope_up,
        slope_narrow_gate,
        slope_narrow_up,
        slope_wide_gate,
        slope_wide_up,
        *slopes_of_shares,
    ]
    slope_of_following = None
    if slope_following is not None:
        slope_of_following = _slope_of_weight(slope_following, hidden)
    return slopes, slope_of_following


def _slope_of_weight(slope: Tensor, value: Tensor) -> Tensor:
    """The gradient [O, I] of a weight that took a value [B, T, I], from that of what it gave [B, T, O]."""
    slope_NO = slope.flatten(0, -2)
    value_NI = value.flatten(0, -2)
    return slope_NO.T @ value_NI


gated.register_autograd(_input_slopes, setup_context=_keep_inputs)
