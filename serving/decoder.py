"""The forward pass of a Llama-like decoder over rows of many sequences and adapters.

Shapes: T rows, D width, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from serving.adapter import Place
from serving.base import Base
from serving.mix import Mix
from serving.passing import Pass


class Operations(Protocol):
    """What a decoder layer is made of: in plain torch, or as kernels that fuse."""

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor: ...
    def norm(
        self, step: Pass, place: Place, x_TD: Tensor, residual_TD: Tensor | None, source: Place | None
    ) -> tuple[Tensor, Tensor]: ...
    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor: ...
    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor: ...
    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor: ...


class Decoder:
    """A base with the operations that run it."""

    def __init__(self, base: Base, operations: Operations) -> None:
        self.base = base
        self.ops = operations

    def embed(self, id_T: Tensor, mix: Mix) -> Tensor:
        """The rows' embeddings [T, D], as the first layer gets them."""
        x_TD = embedding(id_T, self.base.embed_VD)
        for tenant in mix.tenants:
            own_VD = tenant.resident.embed_VD
            if own_VD is not None:
                is_own_T1 = (mix.slot_T == tenant.resident.slot)[:, None]
                own_TD = embedding(id_T, own_VD)
                x_TD = torch.where(is_own_T1, own_TD, x_TD)
        if self.base.shape.embed_scale == 1:
            return x_TD
        return x_TD * self.base.embed_scale

    def forward(self, x_TD: Tensor, step: Pass) -> Tensor:
        """The normed outputs [T, D] of the last layer; keys and values are in the cache then."""
        first = (0, "input_layernorm")
        residual_TD, normed_TD = self.ops.norm(step, first, x_TD, None, None)
        for layer in range(self.base.shape.layers):
            residual_TD, normed_TD = self._attention(step, layer, residual_TD, normed_TD)
            residual_TD, normed_TD = self._feed_forward(step, layer, residual_TD, normed_TD)
        return normed_TD

    def logits(self, x_TD: Tensor, mix: Mix) -> Tensor:
        """The logits [T, V] of normed outputs."""
        logits_TV = linear(x_TD, self.base.head_VD)
        for tenant in mix.tenants:
            own_VD = tenant.resident.head_VD
            if own_VD is not None:
                is_own_T1 = (mix.slot_T == tenant.resident.slot)[:, None]
                own_TV = linear(x_TD, own_VD)
                logits_TV = torch.where(is_own_T1, own_TV, logits_TV)
        return logits_TV

    def _attention(self, step: Pass, layer: int, residual_TD: Tensor, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind a layer's attention, and its norm for the feed-forward layer."""
        ops = self.ops
        qkv_TO = ops.project(step, "qkv", layer, normed_TD)
        query_THE = ops.rotate(step, layer, qkv_TO)
        attended_TI = ops.attend(step, layer, query_THE)
        out_TD = ops.project(step, "o", layer, attended_TI)
        place = (layer, "post_attention_layernorm")
        return ops.norm(step, place, out_TD, residual_TD, (layer, "o"))

    def _feed_forward(self, step: Pass, layer: int, residual_TD: Tensor, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind a layer's feed-forward part, and its norm for what comes next."""
        ops = self.ops
        gate_up_TO = ops.project(step, "gate_up", layer, normed_TD)
        inner_TI = ops.gate(step, layer, gate_up_TO)
        out_TD = ops.project(step, "down", layer, inner_TI)
        place = self._next_norm(layer)
        return ops.norm(step, place, out_TD, residual_TD, (layer, "down"))

    def _next_norm(self, layer: int) -> Place:
        """The norm behind a layer's output: the next layer's first one, or the last of all."""
        following = layer + 1
        if following == self.base.shape.layers:
            return 0, "norm"
        return following, "input_layernorm"
