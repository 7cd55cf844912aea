"""Labels and the logits that predict them. Shapes: B rows, T positions, K of them kept, N labels, V tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from trainer.data.examples import Indices
from trainer.data.layout import IGNORED, collate

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens
    from trainer.kernels.head import LinearHead


def label_arrays(rows: Sequence[Sequence[int]], tokens: "Tokens", pad_id: int) -> dict[str, Indices]:
    """What `logits` reads of a micro-batch's rows, made on the host: a GPU is never asked where the labels are.

    `input_ids` and `position_ids` [B, T]. `kept` [K] are the positions whose logits are needed, one before a label;
    each label [N] has its value `label`, its `row`, and its place in `kept` as `column`. Where there is none, an
    ignored one stands in.
    """
    batch = collate(rows, tokens, pad_id)
    labels_BT = batch.pop("labels")
    next_label = labels_BT[:, 1:]
    is_label = next_label != IGNORED
    row_N, position_N = np.nonzero(is_label)
    if not len(row_N):
        row_N = np.zeros(1, np.int64)
        position_N = np.zeros(1, np.int64)
    kept_K, column_N = np.unique(position_N, return_inverse=True)
    label_N = next_label[row_N, position_N]
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
    documents = {}
    if "documents" in batch:
        documents["documents"] = batch["documents"]
    logits_BKV: torch.Tensor = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,  # with a cache, transformers would not look for documents in position_ids
        logits_to_keep=kept_K,
        **documents,
    ).logits
    if logits_BKV.shape[1] != len(kept_K):  # a model that does not know logits_to_keep
        logits_BKV = logits_BKV[:, kept_K]
    if len(logits_BKV) == 1:
        return logits_BKV[0]
    row_N = batch["row"]
    column_N = batch["column"]
    return logits_BKV[row_N, column_N]


def losses(model: nn.Module, batch: Mapping[str, torch.Tensor], head: "LinearHead") -> torch.Tensor:
    """The cross entropy [N] of each label of a micro-batch, fp32, without holding the logits of all of them."""
    label_N = batch["label"]
    with head.left_out():
        hidden_ND = logits(model, batch)
    return head.losses(hidden_ND, label_N)
