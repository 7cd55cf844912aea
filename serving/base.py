"""The frozen base: a transformers model's own weights, laid out so that layers which share an input are one matrix.

Shapes: L layers, I inputs, O outputs of a group, N = O and the rows behind them, D width, V vocabulary, P positions,
E half of the rotary size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serving.error import BaseRefused
from serving.shape import Shape, check

GROUPS = {  # by name: the module that holds them, and the linear layers that share an input, split or fused
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "o": ("self_attn", ("o_proj",), ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj"), ("gate_up_proj",)),
    "down": ("mlp", ("down_proj",), ("down_proj",)),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
BEHIND = ".behind"  # a site behind a layer's output, where a bottleneck adapter stands
BOTTLENECKS = (f"o_proj{BEHIND}", f"down_proj{BEHIND}")


@dataclass(frozen=True)
class Site:
    """One linear layer of a group, in every decoder layer: its outputs are [start, stop) of the group's."""

    name: str
    module: str
    inputs: int
    start: int
    stop: int

    @property
    def out(self) -> int:
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
    """Linear layers that share their input; `tail` rows behind the weights hold the factors of adapters in use."""

    sites: tuple[Site, ...]
    weight_LNI: Tensor
    bias_LN: Tensor | None
    out: int

    def weight(self, layer: int, rows: int) -> Tensor:
        """The first rows [rows, I] of a layer's weight."""
        return self.weight_LNI[layer, :rows]

    def bias(self, layer: int, rows: int) -> Tensor | None:
        """The first numbers of a layer's bias, if it has one."""
        if self.bias_LN is None:
            return None
        return self.bias_LN[layer, :rows]


class Base:
    """A model's weights by place. The model goes on working: its parameters are views of the same memory."""

    def __init__(self, model: Any, tail: int = 0) -> None:
        """Take over a model's weights, with space for `tail` ranks of adapters' factors behind each linear layer."""
        self.model = model
        self.config = model.config
        self.shape = Shape.of(model.config)
        decoder = model.model
        self.layers = list(decoder.layers)
        self.embed_VD: Tensor = decoder.embed_tokens.weight
        self.head_VD: Tensor = model.lm_head.weight
        self.device: torch.device = self.embed_VD.device
        self.dtype = self.embed_VD.dtype
        if not has_one_type(model, self.dtype):
            raise BaseRefused("base: found weights of several types; allowed: one of float32, bfloat16, float16")
        self.embed_scale = torch.tensor(self.shape.embed_scale, dtype=self.dtype, device=self.device)
        self.groups: dict[str, Group] = {}
        for name, (parent, split, fused) in GROUPS.items():
            self.groups[name] = self._fuse(parent, split, fused, tail)
        self.norms = self._norms(decoder)
        self.sites: dict[str, int] = {}  # the number of each site, by name
        for number, name in enumerate(self._site_names()):
            self.sites[name] = number

    @property
    def on_gpu(self) -> bool:
        """Whether its weights are on a GPU."""
        return self.device.type == "cuda"

    def linears(self) -> Iterator[tuple[int, Site]]:
        """Every linear layer that an adapter may change, with its decoder layer."""
        for layer in range(self.shape.layers):
            for group in self.groups.values():
                for site in group.sites:
                    yield layer, site

    def weight(self, layer: int, name: str) -> Tensor:
        """The weight [out, in] of a linear layer."""
        group, site = self._find(name)
        return group.weight_LNI[layer, site.rows]

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias [out] of a linear layer, if it has one."""
        group, site = self._find(name)
        if group.bias_LN is None:
            return None
        return group.bias_LN[layer, site.rows]

    def rotation(self, config: Any, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [P, E] of the rotary positions that a config of this base's family describes."""
        check(config)
        rotary_class = type(self.model.model.rotary_emb)
        rotary = rotary_class(config=config)
        scaling = rotary.attention_scaling
        frequency_E = rotary.inv_freq.float()
        position_P = torch.arange(positions).float()
        angles_PE = position_P[:, None] * frequency_E.cpu()
        cos_PE = angles_PE.cos() * scaling
        sin_PE = angles_PE.sin() * scaling
        return cos_PE.to(self.device), sin_PE.to(self.device)

    def _find(self, name: str) -> tuple[Group, Site]:
        for group in self.groups.values():
            for site in group.sites:
                if site.name == name:
                    return group, site
        raise KeyError(name)

    def _site_names(self) -> list[str]:
        names: list[str] = []
        for group in self.groups.values():
            names += [site.name for site in group.sites]
        names += BOTTLENECKS
        names += self.norms
        return names

    def _fuse(self, parent: str, split: tuple[str, ...], fused: tuple[str, ...], tail: int) -> Group:
        """The group of a module's linear layers, which become views of one matrix."""
        module = getattr(self.layers[0], parent)
        names = fused
        if hasattr(module, split[0]):
            names = split
        sites = _sites(module, parent, names)
        out = sites[-1].stop
        rows = out + tail * len(sites)
        weight_LNI = self._zeros(rows, sites[0].inputs)
        bias_LN = self._biases(sites, rows)
        for number, layer in enumerate(self.layers):
            for site in sites:
                adopt(site.linear(layer), weight_LNI[number, site.rows])
        return Group(sites, weight_LNI, bias_LN, out)

    def _zeros(self, *size: int) -> Tensor:
        layers = len(self.layers)
        return torch.zeros(layers, *size, dtype=self.dtype, device=self.device)

    def _biases(self, sites: tuple[Site, ...], rows: int) -> Tensor | None:
        first = self.layers[0]
        if all(site.linear(first).bias is None for site in sites):
            return None
        bias_LN = self._zeros(rows)
        for number, layer in enumerate(self.layers):
            for site in sites:
                bias = site.linear(layer).bias
                if bias is not None:
                    bias_LN[number, site.rows] = bias.detach()
        return bias_LN

    def _norms(self, decoder: Any) -> dict[str, Tensor]:
        """Norm weights [L, D] in fp32 by name, Gemma's offset included; the last norm's are [1, D]."""
        norms = {}
        for name in NORMS:
            norms[name] = self._norm_weights(self.layers, name)
        attentions = [layer.self_attn for layer in self.layers]
        if hasattr(attentions[0], HEAD_NORMS[0]):
            for name in HEAD_NORMS:
                norms[name] = self._norm_weights(attentions, name)
        norms["norm"] = self._norm_weights([decoder], "norm")
        return norms

    def _norm_weights(self, parents: list[Any], name: str) -> Tensor:
        weights = []
        for parent in parents:
            weight_D = getattr(parent, name).weight.detach()
            weights.append(weight_D.float() + self.shape.norm_offset)
        return torch.stack(weights)


def has_one_type(model: Any, dtype: torch.dtype) -> bool:
    """Whether all parameters of a model are floating-point numbers of this type."""
    if not dtype.is_floating_point:
        return False
    return all(weight.dtype == dtype for weight in model.parameters())


def _sites(module: Any, parent: str, names: tuple[str, ...]) -> tuple[Site, ...]:
    """The linear layers of a module, whose outputs lie one behind the other."""
    sites = []
    start = 0
    for name in names:
        outputs, inputs = getattr(module, name).weight.shape
        stop = start + outputs
        sites.append(Site(name, parent, inputs, start, stop))
        start = stop
    return tuple(sites)


def adopt(linear: nn.Linear, place_OI: Tensor) -> None:
    """Move a layer's weight to a place that it shares with others, and let the layer use it there."""
    place_OI.copy_(linear.weight.detach())
    linear.weight.data = place_OI
