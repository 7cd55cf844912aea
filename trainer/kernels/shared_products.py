"""Products of one input with several small trained weights, computed as one product.

A low-rank adapter multiplies the input of each of its targets by a narrow weight. Targets that lie side by side
(query, key and value, or gate and up) have one input, which each of these products reads whole, once forward and
twice backward. Here the graph of a compiled region gets one product instead, with the weights below one another. As
this comes before autograd, the backward pass has one product in the place of several too.
"""

from collections import defaultdict
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn.functional import linear

PADDED = torch._C._nn.pad  # what a graph calls for torch.nn.functional.pad
INPUTS_TO_OUTPUTS = 4  # times as many inputs as outputs has a weight that costs little to copy beside its input


def drop_copies(graph: Graph) -> None:
    """Take away each copy of a new product that only the copy reads, in a graph of Dynamo."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target != "clone" or len(node.args) > 1:
            continue
        product = node.args[0]
        if _is_new(product) and len(product.users) == 1:
            node.replace_all_uses_with(product)
            graph.erase_node(node)


def _is_new(node: Node) -> bool:
    """Whether a node gives a product that has memory of its own: an operation of ours shares none with its inputs."""
    namespace = getattr(node.target, "namespace", None)
    if namespace == "fleetune":
        return True
    return node.target is linear


def share_products(graph: Graph) -> None:
    """Join the products of each input with narrow trained weights of one dtype, in a graph of Dynamo."""
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_narrow_product(node):
            value, weight = node.args[:2]
            dtype = traced(weight).dtype
            groups[value, dtype].append(node)
    for products in groups.values():
        if len(products) > 1:
            _join(graph, products)


def _is_narrow_product(node: Node) -> bool:
    """Whether a node multiplies by a trained weight with few outputs, and adds no bias."""
    if not is_product(node) or not is_given(node.args[1]):
        return False
    weight = traced(node.args[1])
    outputs, inputs = weight.shape
    return weight.requires_grad and outputs * INPUTS_TO_OUTPUTS <= inputs


def is_product(value: Any) -> bool:
    """Whether a value is a node that multiplies by a weight, and adds no bias."""
    if not isinstance(value, Node) or value.target is not linear:
        return False
    _, weight, *bias = value.args
    has_bias = bias not in ([], [None])
    if has_bias or value.kwargs:
        return False
    return isinstance(weight, Node)


def is_given(weight: Any) -> bool:
    """Whether a weight is one that the graph is given, or that with zeros around it."""
    if weight.target is PADDED:
        weight = weight.args[0]
    return weight.op in ("placeholder", "get_attr")


def come_before(node: Node, weight: Node) -> None:
    """Have a weight that is given, with zeros around it or not, before a node."""
    if weight.target is PADDED:
        node.prepend(weight)


def _join(graph: Graph, products: list[Node]) -> None:
    """Put one product in the place of several with the same input."""
    first = products[0]
    value = first.args[0]
    weights = []
    widths = []
    for product in products:
        weight = product.args[1]
        weights.append(weight)
        come_before(first, weight)
        outputs = len(traced(weight))
        widths.append(outputs)
    with graph.inserting_before(first):
        joined = graph.call_function(torch.cat, (weights,))
        together = graph.call_function(linear, (value, joined))
        parts = graph.call_function(torch.split, (together, widths, -1))
    for number, product in enumerate(products):
        with graph.inserting_before(product):
            part = graph.call_function(getitem, (parts, number))
        product.replace_all_uses_with(part)
        graph.erase_node(product)


def traced(node: Any) -> Tensor:
    """The tensor without values that Dynamo keeps for a node."""
    tensor: Tensor = node.meta["example_value"]
    return tensor
