"""Attention within documents of different lengths, by flash attention: no mask is made, and padding costs nothing.

Documents lie one behind another in the flattened rows; `starts_S` has where each begins, and the end of the last.
Their backward pass adds in a fixed order, so a run that is resumed goes on bit for bit.
Shapes: B rows, T positions, N = B T tokens, H heads, D head size, S documents + 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as dense
from transformers.masking_utils import sdpa_mask

from trainer.kernels.branches import branch_attention
from trainer.kernels.flash import (
    flash_attention,
    flash_attention_backward,
    keep_for_backward,
    like_attention,
    like_gradients,
)

DOCUMENT_ATTENTION = "documents"  # what `attn_implementation` calls it
LARGEST_HEAD = 256
UNREAD = 1  # columns of a mask that stands where none is needed
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what a base's attention may do, and this does not


@torch.library.custom_op("fleetune::document_attention", mutates_args=())
def document_attention(
    query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, starts_S: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention [N, H, D] within documents of at most `longest` tokens, and the logarithms of its sums."""
    key_starts_S = starts_S  # each document is its own prompt
    return flash_attention(query_NHD, key_NHD, value_NHD, starts_S, key_starts_S, longest, scale)


document_attention.register_fake(like_attention)


@torch.library.custom_op("fleetune::document_attention_backward", mutates_args=())
def document_attention_backward(
    slope_NHD: Tensor,
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    attended_NHD: Tensor,
    sums: Tensor,
    starts_S: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each added up in a fixed order."""
    return flash_attention_backward(
        slope_NHD, query_NHD, key_NHD, value_NHD, attended_NHD, sums, starts_S, starts_S, longest, scale
    )


document_attention_backward.register_fake(like_gradients)


def _backward(ctx: Any, slope_NHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, starts, attended, sums = ctx.saved_tensors
    gradients = document_attention_backward(
        slope_NHD, query, key, value, attended, sums, starts, ctx.longest, ctx.scale
    )
    return (*gradients, None, None, None)


document_attention.register_autograd(_backward, setup_context=keep_for_backward)


def attend_within_documents(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    starts: Tensor | None = None,
    longest: int = 0,
    key_starts: Tensor | None = None,
    key_places: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [B, T, H, D], dense where `tell_documents` told nothing."""
    attended: tuple[Tensor, None]
    if starts is None:
        _refuse_unread(attention_mask, key)
        attended = dense(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return attended
    refuse_arguments(longest, kwargs)
    if not len(starts):
        attended = dense(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)
        return attended
    rows, _, positions, size = query.shape
    query_NHD = flattened(query)
    key_NHD = flattened(key)
    value_NHD = flattened(value)
    scale = scaling
    if scale is None:
        scale = size**-0.5
    if key_starts is None or key_places is None:
        attended_NHD, _ = document_attention(query_NHD, key_NHD, value_NHD, starts, longest, scale)
    else:
        attended_NHD, _ = branch_attention(
            query_NHD, key_NHD, value_NHD, starts, key_starts, key_places, longest, scale
        )
    attended_BTHD = attended_NHD.unflatten(0, (rows, positions))
    return attended_BTHD, None


def flattened(heads_BHTD: Tensor) -> Tensor:
    """Heads [N, H, D] in the dtype of the forward pass; rotated by fp32 positions they may be fp32."""
    dtype = torch.get_autocast_dtype(heads_BHTD.device.type)
    heads_BTHD = heads_BHTD.transpose(1, 2)
    heads_NHD = heads_BTHD.flatten(0, 1)
    return heads_NHD.to(dtype)


def refuse_arguments(longest: int, arguments: dict[str, Any]) -> None:
    """Raise ValueError where a base's attention does what attention within documents does not."""
    window = arguments.get("sliding_window")
    if window is not None and longest > window:
        raise ValueError(f"the base's attention sees {window} tokens back, and documents may be longer")
    for name in UNKNOWN:
        if arguments.get(name) is not None:
            raise ValueError(f"the base's attention has {name}, which attention within documents has not")


def _refuse_unread(mask: Tensor | None, key: Tensor) -> None:
    """Raise ValueError where the mask is the one that nobody reads, but no starts came with it."""
    if mask is None:
        return
    columns = mask.shape[-1]
    keys = key.shape[-2]
    if columns == UNREAD and keys > UNREAD:
        raise ValueError("this base does not hand its decoder's arguments on to its attention")


def tell_documents(decoder: Module, longest: int) -> torch.utils.hooks.RemovableHandle:
    """Tell all layers where documents of at most `longest` tokens start, in passes that have `documents`.

    No starts at all say that each row is one document. Passes without this argument get masks as ever. Where second
    answers share the prompts of first ones, `key_starts` and `key_places` come with it.
    """

    def prepare(module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:  # noqa: ARG001
        """Put the starts among the arguments that the layers get, and leave out their mask."""
        starts_S = kwargs.pop("documents", None)
        if starts_S is None:
            return None
        # transformers hands a mask of four dimensions on as it is, and so makes none of T x T.
        size = (1, 1, 1, UNREAD)
        unread = starts_S.new_zeros(size)
        told = {"attention_mask": unread, "starts": starts_S, "longest": longest}  # others are handed on as they are
        return args, kwargs | told

    return decoder.register_forward_pre_hook(prepare, with_kwargs=True)


AttentionInterface.register(DOCUMENT_ATTENTION, attend_within_documents)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
