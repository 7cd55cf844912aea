"""Which linear layers of the base an adapter's folder changes."""

from collections.abc import Iterator
from dataclasses import dataclass

from serving.adapter import Place
from serving.base import FrozenBase
from serving.folder import Folder
from serving.group import LinearLayer, Names

PREFIX = "base_model.model."  # of the names in PEFT's files


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of the base that an adapter changes."""

    place: Place
    module: str  # its name in the base
    linear_layer: LinearLayer

    @property
    def inputs(self) -> int:
        """Number of its inputs."""
        return self.linear_layer.inputs

    @property
    def outputs(self) -> int:
        """Number of its outputs."""
        return self.linear_layer.outputs

    @property
    def name(self) -> str:
        """What the names of its tensors in PEFT's files begin with."""
        return PREFIX + self.module


def targets(folder: Folder, base: FrozenBase, suffix: str) -> Iterator[AdaptedLinear]:
    """The linear layers that have a tensor whose name ends so, and those that the config lists."""
    names = set(folder.names)
    wanted = wanted_modules(folder)
    for layer, linear_layer in base.linears():
        place = (layer, linear_layer.name)
        module = module_name(layer, linear_layer)
        target = AdaptedLinear(place, module, linear_layer)
        tensor = f"{target.name}.{suffix}"
        if tensor in names or listed(module, wanted):
            yield target


def wanted_modules(folder: Folder) -> Names:
    """The names of linear layers that a config lists, if it lists any."""
    configured = folder.config.get("target_modules")
    if isinstance(configured, list):
        return tuple(configured)
    return ()


def module_name(layer: int, linear_layer: LinearLayer) -> str:
    """The name of a linear layer in the base."""
    parent = f"model.layers.{layer}.{linear_layer.module}"
    return f"{parent}.{linear_layer.name}"


def listed(module: str, wanted: Names) -> bool:
    """Whether a module has one of these names, whole or behind a dot."""
    if module in wanted:
        return True
    endings = tuple(f".{name}" for name in wanted)
    return module.endswith(endings)
