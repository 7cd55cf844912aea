"""The frozen base: a transformers model's own weights, laid out so that layers which share an input are one matrix.

Shapes: L layers, D width, V vocabulary, P positions, F half of the rotary size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from serving.error import BaseRefused
from serving.group import GROUPS, Group, LinearLayer, fuse
from serving.shape import Shape, check

FIRST_NORM = "input_layernorm"
SECOND_NORM = "post_attention_layernorm"
NORMS = (FIRST_NORM, SECOND_NORM)
Q_NORM, K_NORM = "q_norm", "k_norm"
HEAD_NORMS = (Q_NORM, K_NORM)
LAST_NORM = "norm"
BEHIND = ".behind"  # names the place behind a linear layer's output, where a bottleneck adapter stands
Groups = dict[str, Group]  # by name
Modules = list[Any]
Norms = dict[str, Tensor]  # weights [L, D] by name
BOTTLENECKS = (f"o_proj{BEHIND}", f"down_proj{BEHIND}")


class FrozenBase:
    """A model's weights by place. The model goes on working: its parameters are views of the same memory."""

    def __init__(self, model: Any, tail: int = 0) -> None:
        """Take over a model's weights, with space for `tail` ranks of adapters' factors behind each linear layer."""
        config = model.config
        self.model = model
        self.tail = tail
        self.config = config
        self.shape = Shape.of(config)
        decoder = model.model
        layers = list(decoder.layers)
        self.embed_VD: Tensor = decoder.embed_tokens.weight
        self.head_VD: Tensor = model.lm_head.weight
        self.device: torch.device = self.embed_VD.device
        self.dtype = self.embed_VD.dtype
        if not has_one_type(model, self.dtype):
            raise BaseRefused("base: found weights of several types; allowed: one of float32, bfloat16, float16")
        self.embed_scale = self._scalar(self.shape.embed_scale)
        self.groups: Groups = {}
        for name in GROUPS:
            self.groups[name] = fuse(layers, name, tail)
        self.norms = norms_of(decoder, self.shape.norm_offset)
        self.submodules = submodule_numbers(self.groups, self.norms)

    @property
    def is_tied(self) -> bool:
        """Whether its embedding and its head are one weight."""
        embed = self.embed_VD.data_ptr()
        head = self.head_VD.data_ptr()
        return embed == head

    @property
    def on_gpu(self) -> bool:
        """Whether its weights are on a GPU."""
        return self.device.type == "cuda"

    def linears(self) -> Iterator[tuple[int, LinearLayer]]:
        """Every linear layer that an adapter may change, with its decoder layer."""
        for layer in range(self.shape.layers):
            for linear_layer in self._linear_layers():
                yield layer, linear_layer

    def weight(self, layer: int, name: str) -> Tensor:
        """The weight [out, in] of a linear layer."""
        group, linear_layer = self._find(name)
        weight_NI = group.weight_LNI[layer]
        rows = linear_layer.rows
        return weight_NI[rows]

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias [out] of a linear layer, if it has one."""
        group, linear_layer = self._find(name)
        if group.bias_LN is None:
            return None
        bias_N = group.bias_LN[layer]
        rows = linear_layer.rows
        return bias_N[rows]

    def rotation(self, config: Any, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [P, F] of the rotary positions that a config of this base's family describes.

        They are fp32, but have the base's precision: transformers rounds them, so the base was trained with them so.
        """
        check(config)
        decoder = self.model.model
        rotary_class = type(decoder.rotary_emb)
        rotary = rotary_class(config=config)
        scaling = rotary.attention_scaling
        frequency_F = rotary.inv_freq.float()
        frequency_F = frequency_F.cpu()
        position_P = torch.arange(positions)
        position_P = position_P.float()
        position_P1 = position_P[:, None]
        angle_PF = position_P1 * frequency_F
        cos_PF = angle_PF.cos() * scaling
        sin_PF = angle_PF.sin() * scaling
        cos_PF = cos_PF.to(self.device, self.dtype)
        sin_PF = sin_PF.to(self.device, self.dtype)
        return cos_PF.float(), sin_PF.float()

    def _linear_layers(self) -> Iterator[LinearLayer]:
        """The linear layers of a decoder layer."""
        for group in self.groups.values():
            yield from group.linears

    def _scalar(self, number: float) -> Tensor:
        """A number in the base's type, on its device."""
        scalar = torch.tensor(number, dtype=self.dtype)
        return scalar.to(self.device)

    def _find(self, name: str) -> tuple[Group, LinearLayer]:
        """The linear layer of a name, and its group."""
        for group in self.groups.values():
            for linear_layer in group.linears:
                if linear_layer.name == name:
                    return group, linear_layer
        raise KeyError(name)


def has_one_type(model: Any, dtype: torch.dtype) -> bool:
    """Whether all parameters are floating-point numbers of this type; of a model in training, all frozen ones."""
    weights = list(model.parameters())
    frozen = []
    for weight in weights:
        if not weight.requires_grad:
            frozen.append(weight)
    for weight in frozen or weights:
        if weight.dtype != dtype:
            return False
    return dtype.is_floating_point


def submodule_numbers(groups: Groups, norms: Norms) -> dict[str, int]:
    """The number of each submodule by name: linear layers, the places behind them, and norms."""
    names: list[str] = []
    for group in groups.values():
        for linear_layer in group.linears:
            names.append(linear_layer.name)
    names += BOTTLENECKS
    names += norms
    numbers: dict[str, int] = {}
    for name in names:
        numbers[name] = len(numbers)
    return numbers


def norms_of(decoder: Any, offset: float) -> Norms:
    """Norm weights [L, D] in fp32 by name, plus Gemma's offset; the last norm's are [1, D]."""
    layers: Modules = list(decoder.layers)
    attentions: Modules = []
    for layer in layers:
        attentions.append(layer.self_attn)
    first = attentions[0]
    norms: Norms = {}
    for name in NORMS:
        norms[name] = norm_weights(layers, name)
    if hasattr(first, Q_NORM):
        for name in HEAD_NORMS:
            norms[name] = norm_weights(attentions, name)
    norms[LAST_NORM] = norm_weights([decoder], LAST_NORM)
    for name in norms:
        norms[name] += offset
    return norms


def norm_weights(modules: Modules, name: str) -> Tensor:
    """The weights [L, D] of modules' norms of this name, in fp32."""
    weights: list[Tensor] = []
    for module in modules:
        norm = getattr(module, name)
        weight_D = norm.weight.detach()
        weights.append(weight_D.float())
    return torch.stack(weights)
