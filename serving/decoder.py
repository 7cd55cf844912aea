"""The forward pass of a Llama-like decoder over rows of many sequences and adapters.

Shapes: T rows, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from serving.adapter import Place
from serving.base import FIRST_NORM, LAST_NORM, SECOND_NORM, FrozenBase
from serving.mix import AdapterBatch
from serving.passing import Pass
from serving.plain import Plain, Stream


class Decoder:
    """A base with the operations that run it."""

    def __init__(self, base: FrozenBase, operations: Plain) -> None:
        self.base = base
        self.shape = base.shape
        self.operations = operations

    def embed(self, id_T: Tensor, adapters: AdapterBatch) -> Tensor:
        """The rows' embeddings [T, D], as the first layer gets them."""
        x_TD = embedding(id_T, self.base.embed_VD)
        for resident, _ in adapters.members:
            if resident.embed_VD is not None:
                own_TD = embedding(id_T, resident.embed_VD)
                is_own_T1 = adapters.is_of(resident)
                x_TD = torch.where(is_own_T1, own_TD, x_TD)
        if self.shape.embed_scale == 1:
            return x_TD
        return x_TD * self.base.embed_scale

    def forward(self, x_TD: Tensor, step: Pass) -> Tensor:
        """The normed outputs [T, D] of the last layer; keys and values are in the cache then."""
        stream = self.operations.first_norm(step, x_TD)
        for layer in range(self.shape.layers):
            stream = self._attention(step, layer, stream)
            stream = self._feed_forward(step, layer, stream)
        _, normed_TD = stream
        return normed_TD

    def logits(self, x_TD: Tensor, adapters: AdapterBatch) -> Tensor:
        """The logits [T, V] of normed outputs."""
        logits_TV = linear(x_TD, self.base.head_VD)
        for resident, _ in adapters.members:
            if resident.head_VD is not None:
                own_TV = linear(x_TD, resident.head_VD)
                is_own_T1 = adapters.is_of(resident)
                logits_TV = torch.where(is_own_T1, own_TV, logits_TV)
        return logits_TV

    def _attention(self, step: Pass, layer: int, stream: Stream) -> Stream:
        """The residual stream behind a layer's attention, and its norm for the feed-forward layer."""
        residual_TD, normed_TD = stream
        operations = self.operations
        source = (layer, "o")
        place = (layer, SECOND_NORM)
        qkv_TO = operations.project(step, "qkv", layer, normed_TD)
        query_THE = operations.rotate(step, layer, qkv_TO)
        attended_TI = operations.attend(step, layer, query_THE)
        out_TD = operations.project(step, "o", layer, attended_TI)
        return operations.norm(step, place, out_TD, residual_TD, source)

    def _feed_forward(self, step: Pass, layer: int, stream: Stream) -> Stream:
        """The residual stream behind a layer's feed-forward part, and its norm for what comes next."""
        residual_TD, normed_TD = stream
        operations = self.operations
        source = (layer, "down")
        place = self._next_norm(layer)
        gate_up_TO = operations.project(step, "gate_up", layer, normed_TD)
        inner_TI = operations.gate(step, layer, gate_up_TO)
        out_TD = operations.project(step, "down", layer, inner_TI)
        return operations.norm(step, place, out_TD, residual_TD, source)

    def _next_norm(self, layer: int) -> Place:
        """The norm behind a layer's output: the next layer's first one, or the last of all."""
        following = layer + 1
        if following == self.shape.layers:
            return 0, LAST_NORM
        return following, FIRST_NORM
