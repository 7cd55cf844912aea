"""The log-likelihood of documents: of each, the sum over its labels.

Shapes: N labels, C of a chunk, D documents, V tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainer.data.examples import Indices
from trainer.data.layout import IGNORED
from trainer.kernels import Kernels
from trainer.objectives import labels
from trainer.objectives.base import Arrays

if TYPE_CHECKING:
    from trainer.data.tokens import Tokens

CHUNK = 1024  # labels whose logits are held in fp32 at a time
STAND_IN = -1  # in the place of a document's number, in a micro-batch without documents


def likelihood_arrays(
    rows: Sequence[Sequence[int]],
    tokens: "Tokens",
    pad_id: int,
    shared: Indices | None = None,
) -> Arrays:
    """What `log_likelihoods` reads of a micro-batch's rows: labels, and of each document, in order, how many it has.

    `document` [D] are their numbers in the data, and `reference` [D] what the policy before the first step gave them,
    where that is known.
    """
    numbers = list(chain.from_iterable(rows))
    counts_D = tokens.targets[numbers]
    reference = tokens.reference
    reference_D = None if reference is None else reference[numbers]
    if not numbers:  # what stands in has a label that is ignored
        numbers = [STAND_IN]
        counts_D = np.ones(1, np.int64)
        reference_D = np.zeros(1)
    arrays: Arrays = dict(labels.label_arrays(rows, tokens, pad_id, shared))
    arrays["document"] = np.array(numbers, np.int64)
    arrays["labels"] = counts_D
    if reference_D is not None:
        arrays["reference"] = reference_D
    return arrays


def log_likelihoods(model: nn.Module, batch: Mapping[str, torch.Tensor], kernels: Kernels) -> torch.Tensor:
    """The log-likelihood [D] of each document of a micro-batch, fp64; zero for the one that stands in.

    Labels have fp32 losses. Their sum has not: that of a long answer would lose more than a small beta leaves.
    """
    losses_N = label_losses(model, batch, kernels)
    counts_D = batch["labels"]
    losses_D = summed_by_document(losses_N, counts_D)
    return -losses_D


def summed_by_document(losses_N: torch.Tensor, counts_D: torch.Tensor) -> torch.Tensor:
    """The losses of labels, which stand document by document, summed over each [D], fp64."""
    exact_N = losses_N.double()
    return torch.segment_reduce(exact_N, "sum", lengths=counts_D, unsafe=True)


def label_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], kernels: Kernels, temperature: float = 1.0
) -> torch.Tensor:
    """The cross-entropy [N] of each label, fp32, of logits that are divided by a temperature.

    The logits of a chunk are held in fp32, never those of all. Ranks that share rows each get those of all labels.
    """
    losses_N = _own_losses(model, batch, kernels, temperature)
    return kernels.sequence.whole(losses_N, batch)


def _own_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], kernels: Kernels, temperature: float
) -> torch.Tensor:
    """The losses of the labels whose logits this rank has."""
    if kernels.head and temperature == 1:
        return labels.losses(model, batch, kernels.head)
    logits_NV = labels.logits(model, batch)
    label_N = batch["label"]
    if len(label_N) <= CHUNK:
        return _losses_of_chunk(logits_NV, label_N, temperature)
    logits_chunks = logits_NV.split(CHUNK)
    label_chunks = label_N.split(CHUNK)
    chunks = zip(logits_chunks, label_chunks, strict=True)
    losses = []
    for logits_CV, label_C in chunks:
        losses_C = checkpoint(_losses_of_chunk, logits_CV, label_C, temperature, use_reentrant=False)
        losses.append(losses_C)
    return torch.cat(losses)


def _losses_of_chunk(logits_CV: torch.Tensor, label_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """The cross-entropy of a chunk's labels; zero for an ignored one."""
    fp32_CV = logits_CV.float()
    if temperature != 1:
        fp32_CV = fp32_CV / temperature
    return cross_entropy(fp32_CV, label_C, ignore_index=IGNORED, reduction="none")
