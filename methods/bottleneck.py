"""Bottleneck adapters: h + up(f(down(h))) with down in R^{m x D}, up in R^{D x m}, on the output h of a sublayer
before it joins the residual stream.

`houlsby` puts one behind attention and one behind feed-forward (Houlsby et al. 2019, arXiv 1902.00751, section 2.1),
`pfeiffer` behind feed-forward alone (Pfeiffer et al. 2020, arXiv 2005.00247, section 3.1.1). The base's norms stay
frozen. It starts as the identity: up is zero, down is He-normal (He et al. 2015, arXiv 1502.01852, equation 10). With
Houlsby's standard deviation of 0.01 both ends are small, and learning is far slower.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Module

from methods.base import Method, Tensors
from methods.options.other_adapters import Bottleneck

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck.safetensors"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class WithBottleneck(Module):
    """A sublayer's last linear layer with an adapter behind it."""

    def __init__(self, base: Any, size: int, activation: str) -> None:
        super().__init__()
        width = int(base.out_features)
        self.base = base
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = ACTIVATIONS[activation]
        self.enabled = True
        down = self.down
        up = self.up
        nn.init.kaiming_normal_(down.weight, nonlinearity="relu")
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """The sublayer's output, adapted; in the base's dtype."""
        h: Tensor = self.base(x)
        if not self.enabled:
            return h
        x = h.to(self.down.weight.dtype)
        narrow = self.down(x)
        activated = self.activation(narrow)
        update: Tensor = self.up(activated)
        update = update.to(h.dtype)
        return h + update


class BottleneckTuning(Method[Bottleneck]):
    """Adapters in the places that the options name."""

    def attach(self, model: Module) -> Module:
        """Freeze the base, and put adapters behind its sublayers."""
        model.requires_grad_(False)
        insert(model, self.options)
        return model

    @contextmanager
    def reference(self, model: Module) -> Iterator[None]:
        """The base alone, from which the first step leaves."""
        adapters = [adapter for _, adapter in _adapters(model)]
        for adapter in adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True

    def export(self, model: Module, weights: Tensors, folder: Path) -> None:
        """Write bottleneck_config.json and bottleneck.safetensors, which `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.options.model_dump()
        config["base_model_name_or_path"] = model.name_or_path
        text = json.dumps(config, indent=2)
        config_file = folder / CONFIG
        config_file.write_text(text + "\n")
        contiguous: Tensors = {}
        for name, value in weights.items():
            contiguous[name] = value.contiguous()
        save_file(contiguous, folder / WEIGHTS)

    def load(self, base: Module, folder: Path) -> Module:
        """The adapters of a folder on a base: PEFT does not have them."""
        return load(base, folder)


def insert(model: Module, options: Bottleneck) -> None:
    """Put adapters behind the sublayers of a model."""
    places = []
    missing = set(options.sublayer_ends)
    for name, _ in model.named_modules():
        _, _, last_part = name.rpartition(".")
        if last_part in options.sublayer_ends:
            places.append(name)
            missing.discard(last_part)
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{options.placement} adapters need a base with modules named {names}")
    for place in places:
        base = model.get_submodule(place)
        adapter = WithBottleneck(base, options.size, options.activation)
        model.set_submodule(place, adapter)


def load(model: Module, folder: Path) -> Module:
    """A plain transformers model with the adapters of a folder, in evaluation mode."""
    config_file = folder / CONFIG
    text = config_file.read_text()
    config: dict[str, Any] = json.loads(text)
    config.pop("base_model_name_or_path")
    options = Bottleneck(**config)
    insert(model, options)
    file = folder / WEIGHTS
    weights = load_file(file)
    if _weight_names(model) != weights.keys():
        raise ValueError(f"{file}: its weights are not those of this base's adapters")
    model.load_state_dict(weights, strict=False)  # as the base's own weights are there already
    parameter = next(model.parameters())
    model.to(parameter.device)
    return model.eval()


def _adapters(model: Module) -> Iterator[tuple[str, WithBottleneck]]:
    """The adapters that a model has, by name."""
    for name, module in model.named_modules():
        if isinstance(module, WithBottleneck):
            yield name, module


def _weight_names(model: Module) -> set[str]:
    """The names in a model of its adapters' own weights."""
    names = set()
    for adapter_name, adapter in _adapters(model):
        for name, _ in adapter.named_parameters():
            if not name.startswith("base."):
                names.add(f"{adapter_name}.{name}")
    return names
