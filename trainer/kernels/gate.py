"""A gated MLP's activation over adapters of low rank: silu(gate) * up in one pass over memory, forward and backward.

Gate and up are outputs of linear layers that an adapter adds to: y = m (W x + B a), where a is the scaled narrow
product of the adapter and m DoRA's share of each output (1 elsewhere). Written one operation after the other, the sums
B a are as large as the outputs, and go to memory and back. Here the graph of a compiled region gets one operation, which
makes them where they are added. What it gives is made again in the backward pass, and not kept: its other reader,
the narrow product of the next adapter, is therefore a part of it.

Shapes: B rows, T positions, N = B T tokens, F outputs of gate and up, R rank.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn.functional import linear, silu

LARGEST_RANK = 64


class LowRankSum(NamedTuple):
    """The nodes of y = m (base + s B a): where there is no share m, it is 1."""

    base: Node
    narrow: Node
    wide: Node
    scale: float
    share: Node | None


def fuse_gates(graph: Graph) -> None:
    """Put one operation in the place of each product silu(gate) * up whose factors are both sums of low rank."""
    for product in list(graph.nodes):
        if product.target is not operator.mul:
            continue
        activated, up = product.args
        if not isinstance(activated, Node) or activated.target is not silu:
            continue
        gate_sum = _low_rank_sum(activated.args[0])
        up_sum = _low_rank_sum(up)
        if gate_sum is None or up_sum is None:
            continue
        has_shares = {gate_sum.share is not None, up_sum.share is not None}
        if len(has_shares) == 1:
            _replace(graph, product, gate_sum, up_sum)
    graph.eliminate_dead_code()


def _replace(graph: Graph, product: Node, gate: LowRankSum, up: LowRankSum) -> None:
    """Put the operation in the place of a product, and of the narrow product that reads it."""
    dtype = _dtype(gate.base)
    after = _narrow_product_of(product)
    with graph.inserting_before(product):
        arguments: list[Any] = [gate.base, up.base]
        for side in (gate, up):
            scaled = graph.call_function(operator.mul, (side.narrow, side.scale))
            arguments.append(scaled)
        for side in (gate, up):
            wide = graph.call_method("to", (side.wide, dtype))
            arguments.append(wide)
        arguments += [gate.share, up.share]
        following = None
        if after is not None:
            following = graph.call_method("to", (after.args[1], dtype))
        arguments.append(following)
        both = graph.call_function(torch.ops.fleetune.gated.default, tuple(arguments))
        hidden = graph.call_function(operator.getitem, (both, 0))
        narrow = graph.call_function(operator.getitem, (both, 1))
    hidden.meta = dict(product.meta)
    if after is not None:
        narrow.meta = dict(after.meta)
        after.replace_all_uses_with(narrow)
        graph.erase_node(after)
    product.replace_all_uses_with(hidden)


def _low_rank_sum(value: Any) -> LowRankSum | None:
    """The parts of an adapter's sum, as PEFT's LoRA and our DoRA write it; None where a value is none."""
    node = _before_casts(value)
    if not _calls(node, operator.add):
        return None
    base, added = node.args
    if not _calls(base, linear):
        return None
    share = None
    if _calls(added, operator.add):  # (m - 1) base + (m B a) s
        less, added = added.args
        share = _share(less, base)
        if share is None:
            return None
    if not _calls(added, operator.mul):
        return None
    update, scale = added.args
    if share is not None:
        if not _calls(update, operator.mul) or update.args[0] is not share:
            return None
        update = update.args[1]
    if not _calls(update, linear) or not isinstance(scale, float | int):
        return None
    narrow, wide, *bias = update.args
    rank = _tensor(wide).shape[1]
    if bias not in ([], [None]) or rank > LARGEST_RANK:
        return None
    return LowRankSum(base, narrow, wide, scale, share)


def _share(less: Any, base: Node) -> Node | None:
    """The m of (m - 1) base; None where a value is nothing of the kind."""
    if not _calls(less, operator.mul):
        return None
    difference, multiplied = less.args
    if multiplied is not base or not _calls(difference, operator.sub):
        return None
    share, one = difference.args
    return share if one == 1 else None


def _narrow_product_of(hidden: Node) -> Node | None:
    """The product with a narrow trained weight that reads a value; None where there is none, or several."""
    found = []
    for user in list(hidden.users):
        readers = [user]
        if _is_cast(user):
            readers = list(user.users)
        for reader in readers:
            if _calls(reader, linear) and _is_narrow(reader.args[1]):
                found.append(reader)
    return found[0] if len(found) == 1 else None


def _is_narrow(weight: Any) -> bool:
    tensor = _tensor(weight)
    return tensor.requires_grad and len(tensor) <= LARGEST_RANK


def _before_casts(value: Any) -> Any:
    while _is_cast(value):
        value = value.args[0]
    return value


def _is_cast(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_method" and value.target == "to"


def _calls(value: Any, function: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_function" and value.target is function


def _tensor(node: Node) -> Tensor:
    """The tensor without values that Dynamo keeps for a node."""
    tensor: Tensor = node.meta["example_value"]
    return tensor


def _dtype(node: Node) -> torch.dtype:
    return _tensor(node).dtype


@torch.library.custom_op("fleetune::gated", mutates_args=())
def gated(
    gate: Tensor,
    up: Tensor,
    narrow_gate: Tensor,
    narrow_up: Tensor,
    wide_gate: Tensor,
    wide_up: Tensor,
    share_gate: Tensor | None,
    share_up: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The activation [B, T, F], and its product [B, T, R] with the next adapter's narrow weight `following` [R, F].

    `gate` and `up` are outputs of the base [B, T, F], `narrow_*` scaled narrow products [B, T, R], `wide_*` B [F, R].
    """
    if gate.is_cuda:
        from trainer.kernels import gate_kernels

        hidden = gate_kernels.forward(gate, up, narrow_gate, narrow_up, wide_gate, wide_up, share_gate, share_up)
    else:
        gate_sum = _low_rank(gate, narrow_gate, wide_gate)
        up_sum = _low_rank(up, narrow_up, wide_up)
        if share_gate is not None:
            gate_sum = share_gate * gate_sum
            up_sum = share_up * up_sum
        hidden = silu(gate_sum) * up_sum
        hidden = hidden.to(gate.dtype)
    if following is None:
        return hidden, hidden.new_empty(0)
    return hidden, linear(hidden, following)


@gated.register_fake
def _(gate: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    following = others[-1]
    if following is None:
        return hidden, hidden.new_empty(0)
    rank = len(following)
    return hidden, hidden.new_empty(*gate.shape[:-1], rank)


def _low_rank(base: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """base + B a, fp32."""
    return base.float() + linear(narrow.float(), wide.float())


@torch.library.custom_op("fleetune::gated_backward", mutates_args=())
def gated_backward(
    slope: Tensor,
    slope_following: Tensor | None,
    gate: Tensor,
    up: Tensor,
    narrow_gate: Tensor,
    narrow_up: Tensor,
    wide_gate: Tensor,
    wide_up: Tensor,
    share_gate: Tensor | None,
    share_up: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `gate` and `up`, the activation again, and the gradients of the shares [F], fp32, or nothing."""
    if gate.is_cuda:
        from trainer.kernels import gate_kernels

        sides = (gate, up, narrow_gate, narrow_up, wide_gate, wide_up, share_gate, share_up)
        return gate_kernels.backward(slope, slope_following, *sides, following)
    slope = slope.float()
    if slope_following is not None:
        slope = slope + slope_following.float() @ following.float()
    gate_sum = _low_rank(gate, narrow_gate, wide_gate)
    up_sum = _low_rank(up, narrow_up, wide_up)
    gate_value, up_value = gate_sum, up_sum
    if share_gate is not None:
        gate_value, up_value = share_gate * gate_sum, share_up * up_sum
    sigmoid = gate_value.sigmoid()
    activated = gate_value * sigmoid
    hidden = activated * up_value
    slope_gate = slope * up_value * (sigmoid + activated * (1 - sigmoid))
    slope_up = slope * activated
    shares = [slope.new_empty(0), slope.new_empty(0)]
    if share_gate is not None:
        shares = [(slope_gate * gate_sum).flatten(0, -2).sum(0), (slope_up * up_sum).flatten(0, -2).sum(0)]
        slope_gate, slope_up = slope_gate * share_gate, slope_up * share_up
    dtype = gate.dtype
    return slope_gate.to(dtype), slope_up.to(dtype), hidden.to(dtype), *shares


@gated_backward.register_fake
def _(
    slope: Tensor,
    slope_following: Tensor | None,  # noqa: ARG001
    gate: Tensor,
    *others: Tensor | None,
) -> tuple[Tensor, ...]:
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    shares = []
    for share in others[-3:-1]:
        shares.append(slope.new_empty(0 if share is None else len(share), dtype=torch.float32))
    return torch.empty_like(hidden), torch.empty_like(hidden), hidden, *shares


def _save(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, slope: Tensor, slope_following: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs: narrow ones and those of weights are products with what the operation gives."""
    gate, up, narrow_gate, narrow_up, wide_gate, wide_up, share_gate, share_up, following = ctx.saved_tensors
    if following is None:
        slope_following = None
    slope_gate, slope_up, hidden, slope_share_gate, slope_share_up = gated_backward(
        slope, slope_following, gate, up, narrow_gate, narrow_up, wide_gate, wide_up, share_gate, share_up, following
    )
    slopes_of_following = None
    if slope_following is not None:
        slopes_of_following = _of_weight(slope_following, hidden)
    has_shares = share_gate is not None
    return (
        slope_gate,
        slope_up,
        slope_gate @ wide_gate,
        slope_up @ wide_up,
        _of_weight(slope_gate, narrow_gate),
        _of_weight(slope_up, narrow_up),
        slope_share_gate if has_shares else None,
        slope_share_up if has_shares else None,
        slopes_of_following,
    )


def _of_weight(slope: Tensor, value: Tensor) -> Tensor:
    """The gradient [O, I] of a weight that took a value [B, T, I], from that of what it gave [B, T, O]."""
    slope_NO = slope.flatten(0, -2)
    value_NI = value.flatten(0, -2)
    return slope_NO.T @ value_NI


gated.register_autograd(_backward, setup_context=_save)
