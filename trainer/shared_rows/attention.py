"""Attention between two all-to-alls: from all heads of a part of the positions to a part of the heads of them all.

It stands around whatever attention a base has: that of transformers, one of a method's own, or the fast path's. That
one gets whole rows, as on a rank alone, and a `part` that says which heads it has.

Shapes: B rows, T positions, P of them on a rank, H heads, h of them on a rank, D head size, S ranks of a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from methods.options.base import check_heads
from methods.parts.attention import WHOLE_POSITIONS, PartOfHeads
from trainer.kernels.documents import UNREAD
from trainer.shared_rows.group import SequenceGroup, exchange

Attention = Callable[..., tuple[Tensor, None]]
IS_SHARED = "rows_are_shared"  # what attention is told in passes of a part of the positions


def share_rows(base: Any, group: SequenceGroup) -> None:
    """Have a base attend over whole rows in passes that get a part of their positions, and `whole_position_ids`.

    Other passes, as those that generate, stay as they are: each rank makes its own. Raises ValueError where a base
    cannot share rows among so many ranks.
    """
    if group.size == 1:
        return
    config = base.config.get_text_config()
    check_heads(config.to_dict(), group.size)
    inner = base.config._attn_implementation
    is_known = inner in ALL_ATTENTION_FUNCTIONS
    if not is_known or not base._supports_attention_backend:
        raise ValueError(
            f"sharding.sequence: found {group.size} with a base of type {config.model_type}, which calls an "
            "attention of its own; allowed: 1"
        )
    name = f"{inner}_of_{group.size}_ranks"
    inner_attend = ALL_ATTENTION_FUNCTIONS[inner]
    attend = partial(_attend_over_rows, inner_attend, group)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    base.set_attn_implementation(name)
    decoder = base.get_decoder()
    decoder.register_forward_pre_hook(_tell_layers, with_kwargs=True)


def _attend_over_rows(
    inner: Attention,
    group: SequenceGroup,
    module: Module,
    query_BHPD: Tensor,
    key_BHPD: Tensor,
    value_BHPD: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: attention of this rank's positions [B, P, H, D]."""
    if not kwargs.pop(IS_SHARED, False):
        return inner(module, query_BHPD, key_BHPD, value_BHPD, mask, **kwargs)
    if mask is not None and mask.shape[-1] == UNREAD:
        mask = None
    size = group.size
    query = _to_heads(query_BHPD, size)
    key = _to_heads(key_BHPD, size)
    value = _to_heads(value_BHPD, size)
    part = PartOfHeads(group.index, size)
    attended_BThD, _ = inner(module, query, key, value, mask, part=part, **kwargs)
    return _to_positions(attended_BThD, size), None


def _to_heads(x_BHPD: Tensor, size: int) -> Tensor:
    """All positions of this rank's heads [B, h, T, D], from all heads of its positions."""
    x_BShPD = x_BHPD.unflatten(1, (size, -1))
    x_SBhPD = x_BShPD.movedim(1, 0)
    received_SBhPD: Tensor = exchange(x_SBhPD)
    x_BhSPD = received_SBhPD.movedim(0, 2)
    return x_BhSPD.flatten(2, 3)


def _to_positions(x_BThD: Tensor, size: int) -> Tensor:
    """All heads of this rank's positions [B, P, H, D], from all positions of its heads."""
    x_BSPhD = x_BThD.unflatten(1, (size, -1))
    x_SBPhD = x_BSPhD.movedim(1, 0)
    received_SBPhD: Tensor = exchange(x_SBPhD)
    x_BPShD = received_SBPhD.movedim(0, 2)
    return x_BPShD.flatten(2, 3)


def _tell_layers(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Tell all layers that rows are shared, and give them the masks of whole rows; a hook of the decoder."""
    position_BT = kwargs.pop(WHOLE_POSITIONS, None)
    if position_BT is None:
        return None
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _masks(decoder.config, position_BT)
    told = {"attention_mask": mask, IS_SHARED: True}
    return args, kwargs | told


def _masks(config: Any, position_BT: Tensor) -> Any:
    """The mask of whole rows, as transformers makes it: by the type of layer, where a base has several."""
    # Their size is all that is read of embeddings.
    embeddings_BT1 = torch.empty_like(position_BT, dtype=torch.float32)[..., None]
    mask = create_masks_for_generate(config, embeddings_BT1, None, None, position_BT)
    if isinstance(mask, dict) and len(mask) == 1:
        (mask,) = mask.values()
    if mask is None:  # transformers hands a mask of four dimensions on as it is, and so makes none of P x P
        return position_BT.new_zeros(1, 1, 1, UNREAD)
    return mask
