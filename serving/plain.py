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
        self.base, self.shape, self.cache = base, base.shape, cache
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
        residual_TD = x_TD if residual_TD is None else residual_TD + x_TD
        return residual_TD, self.mixed.norm(step.mix, place, residual_TD)

    def rotate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:
        """Queries [T, H, E], rotated; keys, rotated too, and values go to the cache."""
        shape = self.shape
        sizes = [heads * shape.head_size for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        query, key, value = (part.unflatten(1, (-1, shape.head_size)) for part in y_TO.split(sizes, dim=1))
        if "q_norm" in self.base.norms:
            query, key = (self.mixed.norm(step.mix, (layer, n), x) for n, x in (("q_norm", query), ("k_norm", key)))
        self.cache.key_LNHE[layer, step.place_T] = rotated(key, step.cos_TF, step.sin_TF)
        self.cache.value_LNHE[layer, step.place_T] = value
        return rotated(query, step.cos_TF, step.sin_TF)

    def attend(self, step: Pass, layer: int, query_THE: Tensor) -> Tensor:
        """Attention [T, H x E] of every sequence's rows over its keys in the cache."""
        result = torch.empty_like(query_THE)
        for span in step.spans:
            rows = slice(span.row, span.row + span.count)
            at_S = span.places()
            key, value = (held[layer, at_S] for held in (self.cache.key_LNHE, self.cache.value_LNHE))
            result[rows] = attention(query_THE[rows], key, value, span.start, self.shape.window)
        return result.flatten(1)

    def gate(self, step: Pass, layer: int, y_TO: Tensor) -> Tensor:  # noqa: ARG002
        """What the feed-forward layer's down projection gets."""
        gate, up = y_TO.chunk(2, dim=1)
        return (gelu(gate, approximate="tanh") if self.shape.gelu else silu(gate)) * up


def rotated(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Heads whose first 2 F numbers are turned by their position: pairs are F apart."""
    half = cos_TF.shape[1]
    cos, sin = cos_TF[:, None].to(x_THE.dtype), sin_TF[:, None].to(x_THE.dtype)
    first, second, rest = x_THE[..., :half], x_THE[..., half : 2 * half], x_THE[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention(query_THE: Tensor, key_SGE: Tensor, value_SGE: Tensor, start: int, window: int | None) -> Tensor:
    """Causal attention of queries at positions start, start + 1, ... over the keys of positions 0, 1, ..."""
    at_T = torch.arange(start, start + len(query_THE), device=query_THE.device)[:, None]
    at_S = torch.arange(len(key_SGE), device=query_THE.device)[None]
    seen_TS = at_S <= at_T
    if window is not None:
        seen_TS &= at_S > at_T - window
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THE, key_SGE, value_SGE))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=seen_TS, enable_gqa=True)
    return attended[0].transpose(0, 1)
