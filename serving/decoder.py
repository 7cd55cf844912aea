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
        self.base, self.ops = base, operations

    def embed(self, id_T: Tensor, mix: Mix) -> Tensor:
        """The rows' embeddings [T, D], as the first layer gets them."""
        x_TD = embedding(id_T, self.base.embed_VD)
        for tenant in mix.tenants:
            if (own_VD := tenant.resident.embed_VD) is not None:
                mine_T = (mix.slot_T == tenant.resident.slot)[:, None]
                x_TD = torch.where(mine_T, embedding(id_T, own_VD), x_TD)
        return x_TD if self.base.shape.embed_scale == 1 else x_TD * self.base.embed_scale

    def forward(self, x_TD: Tensor, step: Pass) -> Tensor:
        """The normed outputs [T, D] of the last layer; keys and values are in the cache then."""
        ops = self.ops
        residual_TD, normed_TD = ops.norm(step, (0, "input_layernorm"), x_TD, None, None)
        for layer in range(self.base.shape.layers):
            query_THE = ops.rotate(step, layer, ops.project(step, "qkv", layer, normed_TD))
            mixed_TD = ops.project(step, "o", layer, ops.attend(step, layer, query_THE))
            place, source = (layer, "post_attention_layernorm"), (layer, "o")
            residual_TD, normed_TD = ops.norm(step, place, mixed_TD, residual_TD, source)
            inner_TI = ops.gate(step, layer, ops.project(step, "gate_up", layer, normed_TD))
            out_TD = ops.project(step, "down", layer, inner_TI)
            residual_TD, normed_TD = ops.norm(step, self._next(layer), out_TD, residual_TD, (layer, "down"))
        return normed_TD

    def logits(self, x_TD: Tensor, mix: Mix) -> Tensor:
        """The logits [T, V] of normed outputs."""
        logits_TV = linear(x_TD, self.base.head_VD)
        for tenant in mix.tenants:
            if (own_VD := tenant.resident.head_VD) is not None:
                mine_T = (mix.slot_T == tenant.resident.slot)[:, None]
                logits_TV = torch.where(mine_T, linear(x_TD, own_VD), logits_TV)
        return logits_TV

    def _next(self, layer: int) -> Place:
        """The norm behind a layer's output: the next layer's first one, or the last of all."""
        return (layer + 1, "input_layernorm") if layer + 1 < self.base.shape.layers else (0, "norm")
