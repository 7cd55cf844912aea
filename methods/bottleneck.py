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

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methods.base import Method
from methods.options.other_adapters import Bottleneck

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck.safetensors"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class Adapter(nn.Module):
    """A sublayer's last linear layer with an adapter behind it."""

    def __init__(self, base: Any, size: int, activation: str) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(int(base.out_features), size)
        self.up = nn.Linear(size, int(base.out_features))
        self.activation = ACTIVATIONS[activation]
        self.enabled = True
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sublayer's output, adapted; in the base's dtype."""
        h: torch.Tensor = self.base(x)
        if not self.enabled:
            return h
        update: torch.Tensor = self.up(self.activation(self.down(h.to(self.down.weight.dtype))))
        return h + update.to(h.dtype)


class BottleneckTuning(Method[Bottleneck]):
    """Adapters in the places that the options name."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters."""
        model.requires_grad_(False)
        insert(model, self.options)
        return model

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """The base alone, from which the first step leaves."""
        adapters = [module for module in model.modules() if isinstance(module, Adapter)]
        for adapter in adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.enabled = True

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write bottleneck_config.json and bottleneck.safetensors, which `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.options.model_dump() | {"base_model_name_or_path": model.name_or_path}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        """The adapters of a folder on a base: PEFT does not have them."""
        return load(base, folder)


def insert(model: nn.Module, options: Bottleneck) -> None:
    """Put adapters behind the sublayers of a model."""
    ends = {"o_proj", "down_proj"} if options.placement == "houlsby" else {"down_proj"}
    places = [name for name, module in model.named_modules() if name.rpartition(".")[2] in ends]
    missing = ends - {place.rpartition(".")[2] for place in places}
    if missing:
        raise ValueError(f"{options.placement} adapters need a base with modules named {', '.join(sorted(missing))}")
    for place in places:
        model.set_submodule(place, Adapter(model.get_submodule(place), options.size, options.activation))


def load(model: nn.Module, folder: Path) -> nn.Module:
    """A plain transformers model with the adapters of a folder, in evaluation mode."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    config.pop("base_model_name_or_path")
    insert(model, Bottleneck(**config))
    weights = load_file(folder / WEIGHTS)
    wanted = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, Adapter) for k in _adapter_names(m)}
    if wanted != weights.keys():
        raise ValueError(f"{folder / WEIGHTS}: its weights are not those of this base's adapters")
    model.load_state_dict(weights, strict=False)
    return model.to(next(model.parameters()).device).eval()


def _adapter_names(adapter: Adapter) -> list[str]:
    return [name for name, _ in adapter.named_parameters() if not name.startswith("base.")]
