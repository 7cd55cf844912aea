"""The weights of a base by name, whole or sharded, in 16 bits or in 4."""

from torch import nn

from methods.base import Gather
from methods.parts.targets import Linears, Others, is_linear


def shapes(model: nn.Module, gather: Gather) -> tuple[Linears, Others]:
    """The linear layers and the other weights of a base, sharded, quantised or neither."""
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = _shape(model, name, parameter, gather)
        if is_linear(name, shape):
            linears[name.removesuffix(".weight")] = (shape[0], shape[1])
        else:
            others[name] = shape
    return linears, others


def _shape(model: nn.Module, name: str, parameter: nn.Parameter, gather: Gather) -> tuple[int, ...]:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Linear) and name.endswith(".weight"):  # in 4 bits, the weight itself is packed
        return module.out_features, module.in_features
    return tuple(gather.shape(parameter))
