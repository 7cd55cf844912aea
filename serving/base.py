"""The frozen base: a transformers model's own weights, laid out so that layers which share an input are one matrix.

Shapes: L layers, I inputs, O outputs of a group, N = O and the rows behind them, D width, V vocabulary, P positions,
E half of the rotary size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


@dataclass(frozen=True)
class Site:
    """One linear layer of a group, in every decoder layer: its outputs are [start, stop) of the group's."""

    name: str
    module: str
    inputs: int
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input; `tail` rows behind the weights hold the factors of adapters in use."""

    sites: tuple[Site, ...]
    weight_LNI: torch.Tensor
    bias_LN: torch.Tensor | None
    out: int


class Base:
    """A model's weights by place. The model goes on working: its parameters are views of the same memory."""

    def __init__(self, model: Any, tail: int = 0) -> None:
        """Take over a model's weights, with room for `tail` ranks of adapters' factors behind each linear layer."""
        self.model = model
        self.config = model.config
        self.shape = Shape.of(model.config)
        decoder = model.model
        self.layers = list(decoder.layers)
        self.embed_VD: torch.Tensor = decoder.embed_tokens.weight
        self.head_VD: torch.Tensor = model.lm_head.weight
        self.device, self.dtype = self.embed_VD.device, self.embed_VD.dtype
        if not self.dtype.is_floating_point or any(p.dtype != self.dtype for p in model.parameters()):
            raise BaseRefused("base: found weights of several types; allowed: one of float32, bfloat16, float16")
        self.embed_scale = torch.tensor(self.shape.embed_scale, dtype=self.dtype, device=self.device)
        self.groups = {name: self._fuse(*place, tail) for name, place in GROUPS.items()}
        self.norms = self._norms(decoder)
        self.sites = {name: number for number, name in enumerate(self._names())}

    def linears(self) -> Iterator[tuple[int, Site]]:
        """Every linear layer that an adapter may change, with its decoder layer."""
        for layer in range(self.shape.layers):
            for group in self.groups.values():
                yield from ((layer, site) for site in group.sites)

    def weight(self, layer: int, name: str) -> torch.Tensor:
        """The weight [out, in] of a linear layer."""
        for group in self.groups.values():
            for site in group.sites:
                if site.name == name:
                    return group.weight_LNI[layer, site.start : site.stop]
        raise KeyError(name)

    def bias(self, layer: int, name: str) -> torch.Tensor | None:
        """The bias [out] of a linear layer, if it has one."""
        for group in self.groups.values():
            for site in group.sites:
                if site.name == name and group.bias_LN is not None:
                    return group.bias_LN[layer, site.start : site.stop]
        return None

    def rotation(self, config: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [P, E] of the rotary positions that a config of this base's family describes."""
        check(config)
        rotary = type(self.model.model.rotary_emb)(config=config)
        angles_PE = torch.arange(positions).float()[:, None] * rotary.inv_freq.float().cpu()
        scaled = (angles_PE.cos() * rotary.attention_scaling, angles_PE.sin() * rotary.attention_scaling)
        return scaled[0].to(self.device), scaled[1].to(self.device)

    def _names(self) -> list[str]:
        linear = [site.name for group in self.groups.values() for site in group.sites]
        return [*linear, *(f"{name}{BEHIND}" for name in ("o_proj", "down_proj")), *self.norms]

    def _fuse(self, parent: str, split: tuple[str, ...], fused: tuple[str, ...], tail: int) -> Group:
        names = split if hasattr(getattr(self.layers[0], parent), split[0]) else fused
        sites, out = [], 0
        for name in names:
            weight = getattr(getattr(self.layers[0], parent), name).weight
            sites.append(Site(name, parent, weight.shape[1], out, out + weight.shape[0]))
            out += weight.shape[0]
        rows = out + tail * len(sites)
        weight_LNI = torch.zeros(len(self.layers), rows, sites[0].inputs, dtype=self.dtype, device=self.device)
        group = Group(tuple(sites), weight_LNI, self._biases(parent, sites, rows), out)
        for layer, module in enumerate(self.layers):
            for site in sites:
                adopt(getattr(getattr(module, parent), site.name), weight_LNI[layer, site.start : site.stop])
        return group

    def _biases(self, parent: str, sites: list[Site], rows: int) -> torch.Tensor | None:
        first = [getattr(getattr(self.layers[0], parent), site.name).bias for site in sites]
        if all(bias is None for bias in first):
            return None
        bias_LN = torch.zeros(len(self.layers), rows, dtype=self.dtype, device=self.device)
        for layer, module in enumerate(self.layers):
            for site in sites:
                bias = getattr(getattr(module, parent), site.name).bias
                if bias is not None:
                    bias_LN[layer, site.start : site.stop] = bias.detach()
        return bias_LN

    def _norms(self, decoder: Any) -> dict[str, torch.Tensor]:
        """Norm weights [L, D] in fp32 by name, Gemma's offset included; the last norm's are [1, D]."""
        found = {name: [getattr(layer, name) for layer in self.layers] for name in NORMS}
        if hasattr(self.layers[0].self_attn, HEAD_NORMS[0]):
            found |= {name: [getattr(layer.self_attn, name) for layer in self.layers] for name in HEAD_NORMS}
        found["norm"] = [decoder.norm]
        offset = self.shape.norm_offset
        return {name: torch.stack([n.weight.detach().float() + offset for n in ns]) for name, ns in found.items()}


def adopt(linear: nn.Linear, place_OI: torch.Tensor) -> None:
    """Move a layer's weight to a place that it shares with others, and let the layer use it there."""
    place_OI.copy_(linear.weight.detach())
    linear.weight.data = place_OI
