"""The parts of a decoder layer beside its linear layers, in plain torch: the reference, and what the CPU runs.

Shapes: T rows, H query heads, G key-value heads, E head size, F rotary half, O outputs, D width, N places, S keys.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from serving.adapter import Place
from serving.base import Base
from serving.cache import Cache
from serving.mix import PlainMix
from serving.passing import Pass
from serving.pool import Pool


class Plain:
    """The operations of a decoder layer."""

    def __init__(self, base: Base, pool: Pool, cache: Cache) -> None:
        self.base = base
        self.shape = base.shape
        self.cache = cache
        self.mixed = PlainMix(base, pool)

    def project(self, step: Pass, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs of a group of linear layers."""
        return self.mixed.project(step.mix, name, layer, x_TI)

    def norm(
        self,
        step: Pass,
        place: Place,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        source: Place | None,  # noqa: ARG002 (x is complete here; kernels complete it in this pass)
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with x, which comes from the group `source`, and the stream's norm of this place."""
        if residual_TD is not None:
            x_TD = residual_TD + x_TD
        return x_TD, self.mixed.norm(step.mix, place, x_TD)

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries [T, H, E], rotated; keys, rotated too, and values go to the cache."""
        query_THE, key_TGE, value_TGE = self._heads(y_TO)
        if "q_norm" in self.base.norms:
            query_THE = self.mixed.norm(step.mix, (layer, "q_norm"), query_THE)
            key_TGE = self.mixed.norm(step.mix, (layer, "k_norm"), key_TGE)
        cos_TF, sin_TF = step.cos_TF, step.sin_TF
        key_TGE = rotated(key_TGE, cos_TF, sin_TF)
        self.cache.key_LNHE[layer, step.place_T] = key_TGE
        self.cache.value_LNHE[layer, step.place_T] = value_TGE
        return rotated(query_THE, cos_TF, sin_TF)

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention [T, H x E] of every sequence's rows over its keys in the cache."""
        result_THE = torch.empty_like(query_THE)
        for span in step.spans:
            rows = slice(span.row, span.row + span.count)
            place_S = span.places()
            key_SGE = self.cache.key_LNHE[layer, place_S]
            value_SGE = self.cache.value_LNHE[layer, place_S]
            result_THE[rows] = attention(query_THE[rows], key_SGE, value_SGE, span.start, self.shape.window)
        return result_THE.flatten(1)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:  # noqa: ARG002
        """What the feed-forward layer's down projection gets."""
        gate_TI, up_TI = y_TO.chunk(2, dim=1)
        if self.shape.gelu:
            return gelu(gate_TI, approximate="tanh") * up_TI
        return silu(gate_TI) * up_TI

    def _heads(self, y_TO: Tensor) -> list[Tensor]:
        """The queries [T, H, E], keys and values [T, G, E] of the outputs of their linear layers."""
        shape = self.shape
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        sizes = [count * shape.head_size for count in heads]
        parts = y_TO.split(sizes, dim=1)
        return [part_TO.unflatten(1, (-1, shape.head_size)) for part_TO in parts]


def rotated(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Heads whose first 2 F numbers are turned by their position: pairs are F apart."""
    half = cos_TF.shape[1]
    cos_T1F = cos_TF[:, None].to(x_THE.dtype)
    sin_T1F = sin_TF[:, None].to(x_THE.dtype)
    first = x_THE[..., :half]
    second = x_THE[..., half : 2 * half]
    unrotated = x_THE[..., 2 * half :]
    turned_first = first * cos_T1F - second * sin_T1F
    turned_second = second * cos_T1F + first * sin_T1F
    return torch.cat([turned_first, turned_second, unrotated], dim=-1)


def attention(query_THE: Tensor, key_SGE: Tensor, value_SGE: Tensor, start: int, window: int | None) -> Tensor:
    """Causal attention of queries at positions start, start + 1, ... over the keys of positions 0, 1, ..."""
    device = query_THE.device
    stop = start + len(query_THE)
    position_T1 = torch.arange(start, stop, device=device)[:, None]
    position_1S = torch.arange(len(key_SGE), device=device)[None]
    seen_TS = position_1S <= position_T1
    if window is not None:
        seen_TS &= position_1S > position_T1 - window
    query_1HTE = _batch(query_THE)
    key_1GSE = _batch(key_SGE)
    value_1GSE = _batch(value_SGE)
    attended_1HTE = scaled_dot_product_attention(query_1HTE, key_1GSE, value_1GSE, attn_mask=seen_TS, enable_gqa=True)
    return attended_1HTE[0].transpose(0, 1)


def _batch(x_THE: Tensor) -> Tensor:
    """A batch [1, H, T, E] of one sequence, as torch's attention takes it."""
    x_HTE = x_THE.transpose(0, 1)
    return x_HTE[None]
