"""The cross entropy of labels from hidden states: the logits of a chunk of labels are held, never those of all.

Where the head is frozen, the gradient of a chunk's hidden states is found in the forward pass, while its logits are
there. So is the gradient of a trained head where the loss is a sum, whose labels all have one scale; else the logits
are computed again in the backward pass. Shapes: N labels, C of a chunk, D hidden size, V tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.data.layout import IGNORED
from trainer.zero.gather import gathered, shape

LABELS_AT_ONCE = 2048


class LinearHead:
    """A linear head without bias, which the loss takes over: the model then gives what the head would get.

    Where its weight is sharded it is gathered for the loss, and must be frozen.
    """

    def __init__(self, base: Any, dtype: torch.dtype) -> None:
        self._base = base
        self._module: Any = base.get_output_embeddings()  # an nn.Linear, or what PEFT has put around it and its copy
        self._dtype = dtype  # of the forward pass

    @property
    def elements(self) -> int:
        """How many its weight has."""
        return shape(self._module.weight).numel()

    @contextmanager
    def left_out(self) -> Iterator[nn.Module]:
        """Within it, the model gives hidden states in the place of logits; gives what stands where the head was.

        The module is taken out, as ZeRO would gather its weight, and that in the backward pass too.
        """
        gap = nn.Identity()
        self._base.set_output_embeddings(gap)
        try:
            yield gap
        finally:
            self._base.set_output_embeddings(self._module)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """What the model would give of hidden states, in the dtype of its forward pass."""
        hidden_ND = hidden_ND.to(self._dtype)
        with self._whole_weight() as weight_VD:
            return hidden_ND @ weight_VD.T

    def losses(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The cross entropy of each label [N], fp32; zero for an ignored one."""
        return self._losses(hidden_ND, label_N, summed=False)

    def total(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The sum of the labels' cross entropy, fp32."""
        losses_N = self._losses(hidden_ND, label_N, summed=True)
        return losses_N.sum()

    def _losses(self, hidden_ND: Tensor, label_N: Tensor, summed: bool) -> Tensor:
        hidden_ND = hidden_ND.to(self._dtype)
        apply: Any = _LabelLosses.apply
        with self._whole_weight() as weight_VD:
            losses_N: Tensor = apply(hidden_ND, weight_VD, label_N, summed)
        return losses_N

    @contextmanager
    def _whole_weight(self) -> Iterator[Tensor]:
        """The weight [V, D] in the dtype of the forward pass, whole."""
        weight_VD = self._module.weight
        with gathered([weight_VD]):
            yield weight_VD.to(self._dtype)


def chunk_losses(logits_CV: Tensor, label_C: Tensor, scale_C: Tensor | None) -> Tensor:
    """The losses [C] of a chunk, fp32; with scales, the gradients of scaled losses take the place of the logits."""
    if logits_CV.is_cuda:
        from trainer.kernels.cross_entropy import fused_losses

        return fused_losses(logits_CV, label_C, scale_C, IGNORED)
    fp32_CV = logits_CV.float()
    losses_C = cross_entropy(fp32_CV, label_C, ignore_index=IGNORED, reduction="none")
    if scale_C is not None:
        counts_C = label_C != IGNORED
        slope_CV = fp32_CV.softmax(1)
        counted = label_C[counts_C]
        slope_CV[counts_C, counted] -= 1
        weight_C = torch.where(counts_C, scale_C, 0.0)
        slope_CV *= weight_C[:, None]
        logits_CV.copy_(slope_CV)
    return losses_C


def add_in_fp32(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a sum in fp32; on a GPU without a tensor for the product, and unrounded."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


class _LabelLosses(torch.autograd.Function):
    """From hidden states [N, D], a weight [V, D] and labels [N] to losses [N], chunk by chunk.

    `summed` says that the losses' gradients will all be one number.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, summed: bool) -> Tensor:
        """The losses; and the gradients of their sum, where a factor is all that these will lack."""
        hidden_needed, weight_needed, *_ = ctx.needs_input_grad
        ctx.ahead = hidden_needed and (summed or not weight_needed)
        count = len(label_N)
        losses_N = torch.empty(count, dtype=torch.float32, device=label_N.device)
        if ctx.ahead:
            ones_N = torch.ones_like(losses_N)
            gradients = _gradients(hidden_ND, weight_VD, label_N, ones_N, losses_N, weight_needed)
            ctx.save_for_backward(*gradients)
            return losses_N
        for part in _chunks(count):
            hidden_CD = hidden_ND[part]
            label_C = label_N[part]
            logits_CV = hidden_CD @ weight_VD.T
            losses_N[part] = chunk_losses(logits_CV, label_C, None)
            del logits_CV  # before those of the next chunk
        ctx.save_for_backward(hidden_ND, weight_VD, label_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """The gradients, of which that of the weight is added up in fp32."""
        if not ctx.ahead:
            hidden_ND, weight_VD, label_N = ctx.saved_tensors
            losses_N = torch.empty_like(scale_N)
            scale_N = scale_N.contiguous()
            gradient_ND, fp32_VD = _gradients(hidden_ND, weight_VD, label_N, scale_N, losses_N, True)
            assert fp32_VD is not None
            gradient_VD = fp32_VD.to(weight_VD.dtype)
        else:
            ahead_ND, gradient_VD = ctx.saved_tensors
            gradient_ND = ahead_ND * scale_N[:, None]
            gradient_ND = gradient_ND.to(ahead_ND.dtype)
            if gradient_VD is not None:
                scaled_VD = torch.empty_like(gradient_VD, dtype=ahead_ND.dtype)
                gradient_VD = torch.mul(gradient_VD, scale_N[0], out=scaled_VD)
        return gradient_ND, gradient_VD, None, None


def _gradients(
    hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, scale_N: Tensor, losses_N: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of scaled losses: of hidden states, and in fp32 of the weight, if wanted; fills in the losses."""
    gradient_ND = torch.empty_like(hidden_ND)
    gradient_VD = None
    if of_weight:
        gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    for part in _chunks(len(label_N)):
        hidden_CD = hidden_ND[part]
        label_C = label_N[part]
        scale_C = scale_N[part]
        logits_CV = hidden_CD @ weight_VD.T
        losses_N[part] = chunk_losses(logits_CV, label_C, scale_C)
        gradient_CD = gradient_ND[part]
        torch.mm(logits_CV, weight_VD, out=gradient_CD)
        if gradient_VD is not None:
            add_in_fp32(gradient_VD, logits_CV.T, hidden_CD)
        del logits_CV  # before those of the next chunk
    return gradient_ND, gradient_VD


def _chunks(count: int) -> Iterator[slice]:
    """The parts in which so many labels are taken."""
    for first in range(0, count, LABELS_AT_ONCE):
        end = first + LABELS_AT_ONCE
        yield slice(first, end)
