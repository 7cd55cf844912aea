"""Linear layers that share their input, moved into one matrix. Shapes: L layers, I inputs, N outputs and the tail."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Names = tuple[str, ...]
GROUPS: dict[
    str, tuple[str, Names, Names]
] = {  # by name: the module that holds them, and the linear layers that share an input, split or fused
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "o": ("self_attn", ("o_proj",), ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj"), ("gate_up_proj",)),
    "down": ("mlp", ("down_proj",), ("down_proj",)),
}
RESIDUAL = ("o", "down")  # groups whose outputs go to the residual stream


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a group, in every decoder layer: its outputs are [start, stop) of the group's."""

    name: str
    module: str
    inputs: int
    start: int
    stop: int

    @property
    def outputs(self) -> int:
        """The number of its outputs."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Its outputs among the group's, which are also its rows in the group's weight."""
        return slice(self.start, self.stop)

    def linear(self, layer: Any) -> Any:
        """Its linear layer in a decoder layer of the model."""
        parent = getattr(layer, self.module)
        return getattr(parent, self.name)


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input; behind the weights is space for the factors of adapters in use."""

    name: str
    linears: tuple[LinearLayer, ...]
    weight_LNI: Tensor
    bias_LN: Tensor | None
    outputs: int

    @property
    def sections(self) -> int:
        """The number of its linear layers."""
        return len(self.linears)

    @property
    def first_linear(self) -> str:
        """The name of its first linear layer."""
        return self.linears[0].name

    @property
    def is_residual(self) -> bool:
        """Whether its outputs go to the residual stream."""
        return self.name in RESIDUAL

    def weight(self, layer: int, rows: int) -> Tensor:
        """The first rows [rows, I] of a layer's weight."""
        first = slice(rows)
        return self.weight_LNI[layer, first]

    def bias(self, layer: int, rows: int) -> Tensor | None:
        """The first numbers of a layer's bias, if it has one."""
        if self.bias_LN is None:
            return None
        return self.bias_LN[layer, :rows]


Layers = list[Any]  # the decoder layers of a model
LinearLayers = tuple[LinearLayer, ...]


def fuse(layers: Layers, name: str, tail: int) -> Group:
    """The group of this name, whose linear layers become views of one matrix with `tail` more rows for each."""
    parent, split, fused = GROUPS[name]
    module = getattr(layers[0], parent)
    names = fused
    if hasattr(module, split[0]):
        names = split
    linears = linears_of(module, parent, names)
    last = linears[-1]
    outputs = last.stop
    space = tail * len(linears)
    rows = outputs + space
    weight_LNI = moved_weights(layers, linears, rows)
    bias_LN = moved_biases(layers, linears, rows)
    return Group(name, linears, weight_LNI, bias_LN, outputs)


def linears_of(module: Any, parent: str, names: Names) -> LinearLayers:
    """The linear layers of a module, whose outputs lie one behind the other."""
    linears: list[LinearLayer] = []
    start = 0
    for name in names:
        linear = getattr(module, name)
        outputs, inputs = linear.weight.shape
        stop = start + outputs
        linear_layer = LinearLayer(name, parent, inputs, start, stop)
        linears.append(linear_layer)
        start = stop
    return tuple(linears)


def moved_weights(layers: Layers, linears: LinearLayers, rows: int) -> Tensor:
    """The weights [L, N, I] of all layers, which the model's own layers use from now on."""
    first = linears[0]
    example = first.linear(layers[0]).weight
    size = (len(layers), rows, first.inputs)
    weight_LNI = empty_like_layers(example, size)
    for weight_NI, layer in zip(weight_LNI, layers, strict=True):
        for linear_layer in linears:
            linear = linear_layer.linear(layer)
            adopt(linear, weight_NI[linear_layer.rows])
    return weight_LNI


def moved_biases(layers: Layers, linears: LinearLayers, rows: int) -> Tensor | None:
    """The biases [L, N] of all layers, 0 where a linear layer has none; None where no layer has one."""
    modules = [linear_layer.linear(layers[0]) for linear_layer in linears]
    biases = [linear for linear in modules if linear.bias is not None]
    if not biases:
        return None
    example = modules[0].weight
    size = (len(layers), rows)
    bias_LN = empty_like_layers(example, size)
    for bias_N, layer in zip(bias_LN, layers, strict=True):
        for linear_layer in linears:
            bias = linear_layer.linear(layer).bias
            if bias is not None:
                rows_of_layer = linear_layer.rows
                bias_N[rows_of_layer] = bias.detach()
    return bias_LN


def empty_like_layers(example: Tensor, size: tuple[int, ...]) -> Tensor:
    """Zeros of this size, on the device and in the type of an example."""
    return example.new_zeros(size)


def adopt(linear: nn.Linear, place_OI: Tensor) -> None:
    """Move a layer's weight to a place that it shares with others, and let the layer use it there."""
    weight_OI = linear.weight.detach()
    place_OI.copy_(weight_OI)
    linear.weight.data = place_OI
