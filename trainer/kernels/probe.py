"""The probe of the fast path: what a model makes of a few random tokens, on one path and on the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runfolder.job import Job
from trainer.data.tokens import virtual_ids
from trainer.kernels import Kernels
from trainer.kernels.head import LinearHead
from trainer.objectives import labels
from trainer.zero.by_layer import whole_in_part

PROBE_LENGTH = 32  # tokens of each of the probe's documents, beside virtual ones
PROBE_PARAMETERS = 8  # trained parameters whose gradient is compared
# Norm of the difference over that of the plain path's values: bf16 takes 0.03 of the logits of 16 layers.
PROBE_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}
ProbeBatch = dict[str, Tensor]


class Probed(NamedTuple):
    """What a model makes of the probe: logits and loss of each label, and the norm of a few gradients."""

    logits: Tensor
    losses: Tensor
    norm: Tensor


def probe_documents(job: Job, vocabulary: int, device: torch.device) -> list[Tensor]:
    """The ids of two documents of random tokens, of the same length."""
    virtual = virtual_ids(job.method.virtual_tokens)
    virtual_V = torch.tensor(virtual, dtype=torch.long)
    generator = torch.Generator()
    generator.manual_seed(0)
    documents = []
    for _ in range(2):
        drawn = torch.randint(vocabulary, (PROBE_LENGTH,), generator=generator)
        ids_T = torch.cat([virtual_V, drawn])
        ids_T = ids_T[: job.data.seq_len]
        document = ids_T.to(device)
        documents.append(document)
    return documents


def _probe_row(documents: list[Tensor]) -> ProbeBatch:
    """A micro-batch of documents in one row, of which each token is a label that is not virtual."""
    length = len(documents[0])
    ids_T = torch.cat(documents)
    place_T = torch.arange(len(ids_T), device=ids_T.device)
    position_T = place_T % length
    is_real_T = ids_T >= 0
    has_one_before_T = position_T > 0
    is_label_T = is_real_T & has_one_before_T
    (label_place,) = is_label_T.nonzero(as_tuple=True)
    end = len(ids_T) + 1
    starts = torch.arange(0, end, length, dtype=torch.int32, device=ids_T.device)
    return {
        "input_ids": ids_T[None],
        "position_ids": position_T[None],
        "kept": label_place - 1,
        "label": ids_T[label_place],
        "documents": starts,
    }


def probed(model: nn.Module, documents: list[Tensor], kernels: Kernels) -> Probed:
    """What a model makes of the probe's documents in training: in one row, where it knows them apart.

    Of one that is sharded, only the first layers are tried.
    """
    with whole_in_part(model):
        return _probed_whole(model, documents, kernels)


def _probed_whole(model: nn.Module, documents: list[Tensor], kernels: Kernels) -> Probed:
    batches = [_probe_row(documents)]
    if not kernels.in_one_row:
        batches = []
        for document in documents:
            batch = _probe_row([document])
            del batch["documents"]
            batches.append(batch)
    logits = []
    losses = []
    for batch in batches:
        logits_NV, losses_N = _predicted(model, batch, kernels.head)
        logits.append(logits_NV)
        losses.append(losses_N)
    all_losses = torch.cat(losses)
    total = all_losses.sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compared = trained[:PROBE_PARAMETERS]
    gradients = torch.autograd.grad(total, compared, allow_unused=True)
    norms = []
    for gradient in gradients:
        if gradient is not None:
            fp32 = gradient.float()
            norm = fp32.norm()
            norms.append(norm)
    stacked = torch.stack(norms)
    norm = stacked.norm()
    all_logits = torch.cat(logits)
    all_logits = all_logits.float()
    all_losses = all_losses.detach()
    return Probed(all_logits, all_losses, norm)


def _predicted(model: nn.Module, batch: ProbeBatch, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """The logits [N, V] of a batch's labels, without their gradient, and the losses [N]."""
    label_N = batch["label"]
    if head is None:
        logits_NV = labels.logits(model, batch)
        fp32_NV = logits_NV.float()
        width = logits_NV.shape[1]  # of hidden states, where they are revealed
        losses_N = cross_entropy(fp32_NV, label_N % width, reduction="none")
        return logits_NV.detach(), losses_N
    with head.left_out():
        hidden_ND = labels.logits(model, batch)
    losses_N = head.losses(hidden_ND, label_N)
    without_gradient = hidden_ND.detach()
    return head.logits(without_gradient), losses_N


def problem_of_probe(
    model: nn.Module, documents: list[Tensor], kernels: Kernels, expected: Probed, rounding: float
) -> str | None:
    """What is wrong with a model on the fast path; None where nothing is."""
    names = ", ".join(kernels.names)
    try:
        found = probed(model, documents, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, or a base of another kind, raises
        kind = type(error)
        return f"{names}: {kind.__name__}: {error}"
    for name, value, truth in zip(Probed._fields, found, expected, strict=True):
        difference = value - truth
        gap = difference.norm() / truth.norm()
        relative = float(gap)
        if not relative <= rounding:  # also where it is NaN
            return f"{names}: the probe's {name} differ by {relative:.1e}"
    return None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it, nothing is dropped, so that two passes are alike."""
    shares: dict[nn.Dropout, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            shares[module] = module.p
            module.p = 0.0
    try:
        yield
    finally:
        for module, share in shares.items():
            module.p = share
