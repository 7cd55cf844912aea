"""The weights of a base by name, whole or sharded, in 16 bits or in 4."""

from torch import nn
from torch.nn import Module, Parameter

from methods.base import Gather
from methods.parts.targets import Dimensions, Linears, Matrices, Others, is_linear


def shapes(model: Module, gather: Gather) -> tuple[Linears, Others]:
    """The linear layers and the other weights of a base, sharded, quantised or neither."""
    linears: Matrices = {}
    others: dict[str, Dimensions] = {}
    for name, parameter in model.named_parameters():
        shape = _shape(model, name, parameter, gather)
        if not is_linear(name, shape):
            others[name] = shape
            continue
        rows, columns = shape
        module = name.removesuffix(".weight")
        linears[module] = (rows, columns)
    return linears, others


def _shape(model: Module, name: str, parameter: Parameter, gather: Gather) -> Dimensions:
    """The whole shape of a weight, as the 16-bit base has it."""
    module_name, _, _ = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_weight = name.endswith(".weight")
    if is_weight and isinstance(module, nn.Linear):  # in 4 bits, the weight itself is packed
        return module.out_features, module.in_features
    whole = gather.shape(parameter)
    return tuple(whole)
