"""Labels and the logits that predict them. Shapes: B rows, T positions, K of them kept, N labels, V tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from trainer.data.collate import TRUNK, collate
from trainer.data.examples import Indices
from trainer.data.layout import IGNORED

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens
    from trainer.kernels.head import LinearHead


def label_arrays(
    rows: Sequence[Sequence[int]],
    tokens: "Tokens",
    pad_id: int,
    shared: Indices | None = None,
) -> dict[str, Indices]:
    """What `logits` reads of a micro-batch's rows, made on the host: a GPU is never asked where the labels are.

    `input_ids` and `position_ids` [B, T]. `kept` [K] are the positions whose logits are needed, one before a label;
    each label [N] has its value `label`, its `row`, and its place in `kept` as `column`. Where there is none, an
    ignored one stands in. What documents share is computed once, where it is said.
    """
    batch = collate(rows, tokens, pad_id, shared)
    labels_BT = batch.pop("labels")
    next_label = labels_BT[:, 1:]
    is_label = next_label != IGNORED
    row_N, position_N = np.nonzero(is_label)
    if not len(row_N):
        row_N = np.zeros(1, np.int64)
        position_N = np.zeros(1, np.int64)
    label_N = next_label[row_N, position_N]
    if shared is not None:
        before_BT = batch.pop("before")
        own_N = position_N + 1
        before_N = before_BT[row_N, own_N]
        position_N = before_N.clip(0)
    kept_K, column_N = np.unique(position_N, return_inverse=True)
    batch["kept"] = kept_K
    batch["row"] = row_N
    batch["column"] = column_N
    batch["label"] = label_N
    return batch


def logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits [N, V] from which each label of a micro-batch is predicted: those one position before it.

    No others are computed, where the model can do without.
    """
    kept_K = batch["kept"]
    of_rows = {}
    for name in ("documents", "key_starts", "key_places", "whole_position_ids"):
        if name in batch:
            of_rows[name] = batch[name]
    if "part" in batch and "documents" not in batch:
        group_BT = batch["group"]
        part_BT = batch["part"]
        of_rows["attention_mask"] = branch_mask(group_BT, part_BT)
    logits_BKV: torch.Tensor = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,  # with a cache, transformers would not look for documents in position_ids
        logits_to_keep=kept_K,
        **of_rows,
    ).logits
    if logits_BKV.shape[1] != len(kept_K):  # a model that does not know logits_to_keep
        logits_BKV = logits_BKV[:, kept_K]
    is_one_row = len(logits_BKV) == 1
    if is_one_row and "part" not in batch:  # each place is before one label
        return logits_BKV[0]
    row_N = batch["row"]
    column_N = batch["column"]
    return logits_BKV[row_N, column_N]


def branch_mask(group_BT: torch.Tensor, part_BT: torch.Tensor) -> torch.Tensor:
    """Which tokens each one sees [B, 1, T, T]: those before it in its group, of its own branch or of the trunk."""
    T = group_BT.shape[1]
    place_T = torch.arange(T, device=group_BT.device)
    place_T1 = place_T[:, None]
    group_BT1 = group_BT[:, :, None]
    group_B1T = group_BT[:, None]
    part_BT1 = part_BT[:, :, None]
    part_B1T = part_BT[:, None]
    is_before_TT = place_T1 >= place_T
    is_group_BTT = group_BT1 == group_B1T
    is_own_BTT = part_BT1 == part_B1T
    is_trunk_B1T = part_B1T == TRUNK
    of_group_BTT = is_group_BTT & is_before_TT
    is_seen_BTT = is_own_BTT | is_trunk_B1T
    seen_BTT = of_group_BTT & is_seen_BTT
    return seen_BTT[:, None]


def losses(model: nn.Module, batch: Mapping[str, torch.Tensor], head: "LinearHead") -> torch.Tensor:
    """The cross entropy [N] of each label of a micro-batch, fp32, without holding the logits of all of them."""
    hidden_ND = _hidden_states(model, batch, head)
    return head.losses(hidden_ND, batch["label"])


def total_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], head: "LinearHead") -> torch.Tensor:
    """The sum of `losses`, whose gradients cost less."""
    hidden_ND = _hidden_states(model, batch, head)
    return head.total(hidden_ND, batch["label"])


def _hidden_states(model: nn.Module, batch: Mapping[str, torch.Tensor], head: "LinearHead") -> torch.Tensor:
    """What a head would get [N, D] of each label."""
    with head.left_out():
        return logits(model, batch)
