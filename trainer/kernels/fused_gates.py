"""Each silu(gate) * up of a compiled region, where an adapter of low rank adds to gate and up, as one operation.

Operation by operation, sums as large as the outputs of gate and up go to memory and come back; `gate.py` makes them
where they are needed. This finds them in a graph of Dynamo, before autograd.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.nn.functional import silu

from trainer.kernels.gate import LARGEST_GATE_RANK
from trainer.kernels.shared_products import come_before, is_given, is_product, traced


class LowRankSum(NamedTuple):
    """The nodes of m (base + s B a), where a are the narrow products A x, and m is DoRA's share, elsewhere 1."""

    base: Node
    narrow: Node
    wide: Node
    scale: float
    share: Node | None


def fuse_gates(graph: Graph) -> None:
    """Put one operation in the place of each silu(gate) * up in a graph, where both are sums of low rank."""
    for product in list(graph.nodes):
        if not _calls(product, operator.mul):
            continue
        activated, up = product.args
        if not _calls(activated, silu):
            continue
        gate_sum = _sum_of_low_rank(activated.args[0])
        up_sum = _sum_of_low_rank(up)
        if gate_sum is None or up_sum is None:
            continue
        both_have_shares = (gate_sum.share is None) == (up_sum.share is None)
        if both_have_shares:
            _replace(graph, product, gate_sum, up_sum)
    graph.eliminate_dead_code()


def _replace(graph: Graph, product: Node, gate: LowRankSum, up: LowRankSum) -> None:
    """Put the operation in the place of a product, and of the next adapter's product with it."""
    dtype = _dtype(gate.base)
    next_product = _narrow_product_of(product)
    with graph.inserting_before(product):
        gate_narrow = graph.call_function(operator.mul, (gate.narrow, gate.scale))
        up_narrow = graph.call_function(operator.mul, (up.narrow, up.scale))
        gate_wide = graph.call_method("to", (gate.wide, dtype))
        up_wide = graph.call_method("to", (up.wide, dtype))
        following = None
        if next_product is not None:
            next_weight = next_product.args[1]
            come_before(product, next_weight)
            following = graph.call_method("to", (next_weight, dtype))
        tensors = [gate.base, up.base, gate_narrow, up_narrow, gate_wide, up_wide]
        if gate.share is not None and up.share is not None:
            tensors += [gate.share, up.share]
        gated = torch.ops.fleetune.gated
        both = graph.call_function(gated.default, (tensors, following))
        hidden = graph.call_function(operator.getitem, (both, 0))
        narrow = graph.call_function(operator.getitem, (both, 1))
    if next_product is not None:
        next_product.replace_all_uses_with(narrow)
        graph.erase_node(next_product)
    product.replace_all_uses_with(hidden)


def _sum_of_low_rank(value: Any) -> LowRankSum | None:
    """The parts of base + (B a) s, as PEFT's LoRA writes it, or of DoRA's sum; None where a value is neither."""
    node = _before_casts(value)
    if not _calls(node, operator.add):
        return None
    base, added = node.args
    if not isinstance(base, Node) or "example_value" not in base.meta:
        return None
    added = _before_casts(added)
    share = None
    if _calls(added, operator.add):  # base + ((m - 1) base + (m (B a)) s)
        rest_of_base, added = added.args
        share = _share(rest_of_base, base)
        if share is None:
            return None
    if not _calls(added, operator.mul):
        return None
    update, scale = added.args
    if share is not None:
        if not _calls(update, operator.mul):
            return None
        multiplied, update = update.args
        if multiplied is not share:
            return None
    if not is_product(update) or not isinstance(scale, float | int):
        return None
    narrow, wide = update.args[:2]
    rank = traced(wide).shape[1]
    if rank > LARGEST_GATE_RANK:
        return None
    of_update = traced(update)
    of_base = traced(base)
    if of_update.dtype != of_base.dtype:
        return None
    if of_update.shape != of_base.shape:
        return None
    return LowRankSum(base, narrow, wide, scale, share)


def _share(value: Any, base: Node) -> Node | None:
    """The m of (m - 1) base; None where a value is nothing of the kind."""
    if not _calls(value, operator.mul):
        return None
    difference, multiplied = value.args
    if multiplied is not base or not _calls(difference, operator.sub):
        return None
    share: Node
    share, one = difference.args
    return share if one == 1 else None


def _narrow_product_of(hidden: Node) -> Node | None:
    """The product of a value with a narrow trained weight; None where there is none, or are several."""
    found = []
    for user in list(hidden.users):
        readers = list(user.users) if _is_cast(user) else [user]
        for reader in readers:
            if _multiplies_by_a(reader) and _dtype(reader) == _dtype(hidden):
                found.append(reader)
    return found[0] if len(found) == 1 else None


def _multiplies_by_a(node: Node) -> bool:
    """Whether a node multiplies by a weight [R, F] that is trained and given to the graph, and its rank small."""
    if not is_product(node):
        return False
    factor = node.args[1]
    if not is_given(factor):
        return False
    weight = traced(factor)
    return weight.requires_grad and len(weight) <= LARGEST_GATE_RANK


def _before_casts(value: Any) -> Any:
    while _is_cast(value):
        value = value.args[0]
    return value


def _is_cast(value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    is_method: bool = value.op == "call_method"
    return is_method and value.target == "to"


def _calls(value: Any, function: Any) -> bool:
    if not isinstance(value, Node):
        return False
    is_call: bool = value.op == "call_function"
    return is_call and value.target is function


def _dtype(node: Node) -> torch.dtype:
    return traced(node).dtype
