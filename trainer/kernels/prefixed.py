"""Attention within documents that all see the same trained keys and values in front of their own: prefix tuning's.

Documents lie one behind another in the flattened rows, as in `documents.py`. For flash attention, the keys of each
are laid out behind a copy of the prefix; its last queries are those of its last keys. The gradients of the copies are
added up over documents in a fixed order.
Shapes: N tokens, M keys with prefixes, V of a prefix, H heads, D head size, S documents + 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface

from methods.parts.attention import ALL_HEADS, PartOfHeads
from methods.prefix import attend_with_prefix, mask_of_documents
from trainer.kernels.documents import flattened, refuse_arguments
from trainer.kernels.flash import (
    flash_attention,
    flash_attention_backward,
    keep_for_backward,
    like_attention,
    like_gradients,
)

PREFIX_ATTENTION = "documents_with_prefix"  # what `attn_implementation` calls it


class KeyPlaces(NamedTuple):
    """Where keys are laid out: where those of each document start, each token's own one, and those of prefixes."""

    start_S: Tensor
    own_N: Tensor
    front_EV: Tensor  # E documents

    @classmethod
    def of(cls, starts_S: Tensor, tokens: int, in_front: int) -> "KeyPlaces":
        """The places of so many tokens, with so many keys in front of each document."""
        device = starts_S.device
        token_N = torch.arange(tokens, device=device)
        begun_N = torch.searchsorted(starts_S, token_N, right=True)  # documents, with the token's own
        documents = len(starts_S)
        prefixes_S = torch.arange(documents, dtype=starts_S.dtype, device=device)
        start_S = starts_S + in_front * prefixes_S
        own_N = token_N + in_front * begun_N
        start_E1 = start_S[:-1, None]
        of_prefix_V = torch.arange(in_front, device=device)
        return cls(start_S, own_N, start_E1 + of_prefix_V)

    def laid_out(self, own_NHD: Tensor, prefix_VHD: Tensor) -> Tensor:
        """Keys or values [M, H, D], from those of tokens and of the prefix."""
        count = len(self.own_N) + self.front_EV.numel()
        laid_MHD = own_NHD.new_empty(count, *own_NHD.shape[1:])
        laid_MHD[self.own_N] = own_NHD
        laid_MHD[self.front_EV] = prefix_VHD
        return laid_MHD

    def given_back(self, slope_MHD: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes of tokens [N, H, D], and of the prefix [V, H, D] over all documents."""
        own_NHD = slope_MHD[self.own_N]
        front_EVHD = slope_MHD[self.front_EV]
        prefix_VHD = front_EVHD.sum(0, dtype=torch.float32)
        return own_NHD, prefix_VHD.to(slope_MHD.dtype)


def _with_prefixes(
    key_NHD: Tensor, value_NHD: Tensor, prefix_2VHD: Tensor, starts_S: Tensor
) -> tuple[KeyPlaces, Tensor, Tensor]:
    """Keys and values [M, H, D] with a copy of the prefix in front of each document, and where they are."""
    key_VHD, value_VHD = prefix_2VHD
    tokens = len(key_NHD)
    in_front = len(key_VHD)
    places = KeyPlaces.of(starts_S, tokens, in_front)
    return places, places.laid_out(key_NHD, key_VHD), places.laid_out(value_NHD, value_VHD)


@torch.library.custom_op("fleetune::prefix_attention", mutates_args=())
def prefix_attention(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    prefix_2VHD: Tensor,
    starts_S: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention [N, H, D] within documents to the prefix and themselves, and the logarithms of its sums.

    `longest` is the most keys that a document has, with the prefix.
    """
    places, key_MHD, value_MHD = _with_prefixes(key_NHD, value_NHD, prefix_2VHD, starts_S)
    key_starts_S = places.start_S
    attention = flash_attention(query_NHD, key_MHD, value_MHD, starts_S, key_starts_S, longest, scale)
    attended_NHD, sums = attention
    return attended_NHD, sums


prefix_attention.register_fake(like_attention)


@torch.library.custom_op("fleetune::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    slope_NHD: Tensor,
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    prefix_2VHD: Tensor,
    starts_S: Tensor,
    attended_NHD: Tensor,
    sums: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and prefix."""
    places, key_MHD, value_MHD = _with_prefixes(key_NHD, value_NHD, prefix_2VHD, starts_S)
    key_starts_S = places.start_S
    slopes = flash_attention_backward(
        slope_NHD, query_NHD, key_MHD, value_MHD, attended_NHD, sums, starts_S, key_starts_S, longest, scale
    )
    query_slope, key_slope_MHD, value_slope_MHD = slopes
    key_slope, key_of_prefix_VHD = places.given_back(key_slope_MHD)
    value_slope, value_of_prefix_VHD = places.given_back(value_slope_MHD)
    of_prefix_2VHD = torch.stack([key_of_prefix_VHD, value_of_prefix_VHD])
    return query_slope, key_slope, value_slope, of_prefix_2VHD


@prefix_attention_backward.register_fake
def _like_slopes(*inputs: Any) -> tuple[Tensor, ...]:
    """Tensors like the gradients of query, key, value and prefix."""
    of_others = like_gradients(*inputs)
    prefix_2VHD = inputs[4]
    of_prefix = torch.empty_like(prefix_2VHD, memory_format=torch.contiguous_format)
    return (*of_others, of_prefix)


def _slopes_with_prefix(ctx: Any, slope_NHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, prefix, starts, attended, sums = ctx.saved_tensors
    gradients = prefix_attention_backward(
        slope_NHD, query, key, value, prefix, starts, attended, sums, ctx.longest, ctx.scale
    )
    return (*gradients, None, None, None)


prefix_attention.register_autograd(_slopes_with_prefix, setup_context=keep_for_backward)


def attend_within_documents_with_prefix(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    starts: Tensor | None = None,
    longest: int = 0,
    part: PartOfHeads = ALL_HEADS,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [B, T, H, D], dense where `tell_documents` told nothing."""
    attended: tuple[Tensor, None]
    if starts is None:
        attended = attend_with_prefix(module, query, key, value, attention_mask, part, scaling=scaling, **kwargs)
        return attended
    refuse_arguments(longest, kwargs)
    if kwargs.get("key_places") is not None:
        raise ValueError("documents with a prefix do not share their prompts")
    rows, _, positions, size = query.shape
    if not len(starts):
        tokens = rows * positions
        starts = torch.arange(0, tokens + 1, positions, dtype=torch.int32, device=query.device)
    query_NHD = flattened(query)
    heads = part.places(key.shape[1])
    prefix: Any = module.prefix
    prefix_2HVD = prefix[:, heads].to(query_NHD.dtype)
    prefix_2VHD = prefix_2HVD.transpose(1, 2)
    most_keys = longest + prefix.shape[2]
    scale = scaling
    if scale is None:
        scale = size**-0.5
    attended_NHD, _ = prefix_attention(
        query_NHD, flattened(key), flattened(value), prefix_2VHD, starts, most_keys, scale
    )
    return attended_NHD.unflatten(0, (rows, positions)), None


AttentionInterface.register(PREFIX_ATTENTION, attend_within_documents_with_prefix)
AttentionMaskInterface.register(PREFIX_ATTENTION, mask_of_documents)
