"""Supervised fine-tuning: cross entropy of the labels. Shapes: B rows, T positions, N labels, V tokens."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainer.batches import IGNORED

CHUNK = 1024  # labels whose logits are held in fp32 at a time


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The sum of the cross entropy over the labels of a micro-batch, in fp32, and their number.

    Logits are computed only where a label is predicted: one position before it. A micro-batch without labels gives
    zero, with zero gradients for all that others reach, so that collectives stay in step.
    """
    labels_BT = batch["labels"]
    row_N, column_N = torch.nonzero(labels_BT[:, 1:] != IGNORED, as_tuple=True)
    weight = len(row_N)
    if not weight:
        row_N = column_N = labels_BT.new_zeros(1)
    kept_K, where_N = torch.unique(column_N, return_inverse=True)
    logits_BKV = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,  # with a cache, transformers would not look for documents in position_ids
        logits_to_keep=kept_K,
    ).logits
    if logits_BKV.shape[1] != len(kept_K):  # a model that does not know logits_to_keep
        logits_BKV = logits_BKV[:, kept_K]
    logits_NV = logits_BKV[0] if len(logits_BKV) == 1 else logits_BKV[row_N, where_N]
    return _cross_entropy(logits_NV, labels_BT[row_N, column_N + 1]), weight


def _cross_entropy(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    pairs = zip(logits_NV.split(CHUNK), label_N.split(CHUNK), strict=True)
    if len(label_N) <= CHUNK:
        return _chunk(logits_NV, label_N)
    return torch.stack([checkpoint(_chunk, *pair, use_reentrant=False) for pair in pairs]).sum()


def _chunk(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_NV.float(), label_N, ignore_index=IGNORED, reduction="sum")
