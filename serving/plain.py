"""The parts of a decoder layer beside its linear layers, in plain torch: the reference, and what the CPU runs.

Shapes: T rows, H query heads, G key-value heads, E head size, F rotary half, O outputs, D width, N places, S keys.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from serving.adapter import Place
from serving.base import FIRST_NORM, K_NORM, Q_NORM, FrozenBase
from serving.cache import Cache
from serving.linear import PlainLinears
from serving.passing import Pass, Span
from serving.pool import Pool

Stream = tuple[Tensor, Tensor]  # [T, D] each: the residual stream, and its norm


class Plain:
    """The operations of a decoder layer; on a GPU, kernels that fuse take the place of most."""

    def __init__(self, base: FrozenBase, pool: Pool, cache: Cache) -> None:
        self.base = base
        self.shape = base.shape
        self.cache = cache
        self.linears = PlainLinears(base, pool)
        self.has_head_norms = Q_NORM in base.norms

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs of a group of linear layers."""
        adapters = step.adapters
        return self.linears.project(adapters, name, layer, x_TI)

    def first_norm(self, step: Pass, x_TD: Tensor) -> Stream:
        """The residual stream that embeddings begin, with the norm of the first layer."""
        place = (0, FIRST_NORM)
        normed_TD = self.linears.norm(step.adapters, place, x_TD)
        return x_TD, normed_TD

    def norm(
        self,
        step: Pass,
        place: Place,
        x_TD: Tensor,
        stream_TD: Tensor,
        source: Place,  # noqa: ARG002 (x is complete here; kernels complete it in this pass)
    ) -> Stream:
        """The residual stream with x, which comes from the group `source`, and the stream's norm of this place."""
        sum_TD = stream_TD + x_TD
        normed_TD = self.linears.norm(step.adapters, place, sum_TD)
        return sum_TD, normed_TD

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries [T, H, E], rotated; keys, rotated too, and values go to the cache."""
        query_THE, key_TGE, value_TGE = self._heads(y_TO)
        if self.has_head_norms:
            adapters = step.adapters
            q_norm = (layer, Q_NORM)
            k_norm = (layer, K_NORM)
            query_THE = self.linears.norm(adapters, q_norm, query_THE)
            key_TGE = self.linears.norm(adapters, k_norm, key_TGE)
        cos_TF = step.cos_TF
        sin_TF = step.sin_TF
        place_T = step.place_T
        key_TGE = rotated(key_TGE, cos_TF, sin_TF)
        query_THE = rotated(query_THE, cos_TF, sin_TF)
        key_NGE = self.cache.key_LNHE[layer]
        value_NGE = self.cache.value_LNHE[layer]
        key_NGE[place_T] = key_TGE
        value_NGE[place_T] = value_TGE
        return query_THE

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention [T, H x E] of every sequence's rows over its keys in the cache."""
        key_NGE = self.cache.key_LNHE[layer]
        value_NGE = self.cache.value_LNHE[layer]
        result_THE = torch.empty_like(query_THE)
        for span in step.spans:
            rows = span.rows
            place_S = span.places()
            key_SGE = key_NGE[place_S]
            value_SGE = value_NGE[place_S]
            seen_TS = self._seen(span)
            own_THE = query_THE[rows]
            result_THE[rows] = attention(own_THE, key_SGE, value_SGE, seen_TS)
        return result_THE.flatten(1)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:  # noqa: ARG002
        """What the feed-forward layer's down projection gets."""
        gate_TI, up_TI = y_TO.chunk(2, dim=1)
        if self.shape.gelu:
            opened_TI = gelu(gate_TI, approximate="tanh")
            return opened_TI * up_TI
        opened_TI = silu(gate_TI)
        return opened_TI * up_TI

    def _heads(self, y_TO: Tensor) -> list[Tensor]:
        """The queries [T, H, E], keys and values [T, G, E] of the outputs of their linear layers."""
        shape = self.shape
        size = shape.head_size
        sizes = [shape.query_size, shape.key_size, shape.key_size]
        heads: list[Tensor] = []
        for part_TO in y_TO.split(sizes, dim=1):
            part_THE = part_TO.unflatten(1, (-1, size))
            heads.append(part_THE)
        return heads

    def _seen(self, span: Span) -> Tensor:
        """Which positions [T, S] from the first on each row of a span sees: none behind it, nor before the window."""
        device = self.base.device
        window = self.shape.window
        position_T = torch.arange(span.start, span.stop, device=device)
        position_S = torch.arange(span.stop, device=device)
        position_T1 = position_T[:, None]
        seen_TS = position_S <= position_T1
        if window is not None:
            first_T1 = position_T1 - window
            seen_TS &= position_S > first_T1
        return seen_TS


def rotated(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Heads whose first 2 F numbers are turned by their position: pairs are F apart."""
    _, half = cos_TF.shape
    _, _, size = x_THE.shape
    unrotated = size - 2 * half
    sizes = [half, half, unrotated]
    first, second, rest = x_THE.split(sizes, dim=2)
    cos_T1F = cos_TF[:, None]
    sin_T1F = sin_TF[:, None]
    cos_T1F = cos_T1F.to(x_THE.dtype)
    sin_T1F = sin_T1F.to(x_THE.dtype)
    turned_first = first * cos_T1F
    turned_first -= second * sin_T1F
    turned_second = second * cos_T1F
    turned_second += first * sin_T1F
    turned = [turned_first, turned_second, rest]
    return torch.cat(turned, dim=-1)


def attention(query_THE: Tensor, key_SGE: Tensor, value_SGE: Tensor, seen_TS: Tensor) -> Tensor:
    """Attention [T, H, E] of a sequence's queries over the keys that each of them sees."""
    query_1HTE = _as_batch(query_THE)
    key_1GSE = _as_batch(key_SGE)
    value_1GSE = _as_batch(value_SGE)
    attended_1HTE = scaled_dot_product_attention(query_1HTE, key_1GSE, value_1GSE, attn_mask=seen_TS, enable_gqa=True)
    attended_HTE = attended_1HTE[0]
    return attended_HTE.transpose(0, 1)


def _as_batch(x_THE: Tensor) -> Tensor:
    """A batch [1, H, T, E] of one sequence, as torch's attention takes it."""
    x_HTE = x_THE.transpose(0, 1)
    return x_HTE[None]
