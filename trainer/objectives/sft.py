"""Supervised fine-tuning: cross entropy of the labels. Shapes: B rows, T positions, N labels, V tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainer.data.batches import IGNORED, Indices, MicroBatch, collate

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

CHUNK = 1024  # labels whose logits are held in fp32 at a time


def arrays(micro: MicroBatch, tokens: "Tokens", pad_id: int) -> dict[str, Indices]:
    """What `loss` reads of a micro-batch, made on the host, so that a GPU is never asked where the labels are.

    `input_ids` and `position_ids` [B, T]. `kept` [K] are the positions whose logits are needed, one before a label;
    each label [N] has its value `label`, its `row`, and its place in `kept` as `column`. Where there is none, an
    ignored one stands in.
    """
    batch = collate(micro, tokens, pad_id)
    labels_BT = batch.pop("labels")
    row_N, position_N = np.nonzero(labels_BT[:, 1:] != IGNORED)
    if not len(row_N):
        row_N = position_N = np.zeros(1, np.int64)
    kept_K, column_N = np.unique(position_N, return_inverse=True)
    return batch | {"kept": kept_K, "row": row_N, "column": column_N, "label": labels_BT[row_N, position_N + 1]}


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropy over the labels of a micro-batch, in fp32, and their number.

    Logits are computed only where a label is predicted: one position before it. A micro-batch without labels gives
    zero, with zero gradients for all that others reach, so that collectives stay in step.
    """
    kept_K, label_N = batch["kept"], batch["label"]
    logits_BKV = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,  # with a cache, transformers would not look for documents in position_ids
        logits_to_keep=kept_K,
    ).logits
    if logits_BKV.shape[1] != len(kept_K):  # a model that does not know logits_to_keep
        logits_BKV = logits_BKV[:, kept_K]
    logits_NV = logits_BKV[0] if len(logits_BKV) == 1 else logits_BKV[batch["row"], batch["column"]]
    return _cross_entropy(logits_NV, label_N), (label_N != IGNORED).sum()


def _cross_entropy(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    pairs = zip(logits_NV.split(CHUNK), label_N.split(CHUNK), strict=True)
    if len(label_N) <= CHUNK:
        return _chunk(logits_NV, label_N)
    return torch.stack([checkpoint(_chunk, *pair, use_reentrant=False) for pair in pairs]).sum()


def _chunk(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_NV.float(), label_N, ignore_index=IGNORED, reduction="sum")
