"""The cross entropy of labels from hidden states: the logits of a chunk of labels are held, never those of all.

Where the head is frozen, the gradient of a chunk's hidden states is found in the forward pass, while its logits are
there; else they are computed again in the backward pass. Shapes: N labels, C of a chunk, D hidden size, V tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.data.layout import IGNORED

LABELS_AT_ONCE = 2048


class LinearHead:
    """A linear head without bias, which the loss takes over: the model then gives what the head would get."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype  # of the forward pass

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it, the model gives hidden states in the place of logits."""
        module: Any = self._module
        module.forward = _as_it_is
        try:
            yield
        finally:
            del module.forward

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """What the model would give of hidden states, in the dtype of its forward pass."""
        hidden_ND = hidden_ND.to(self._dtype)
        weight_VD = self._module.weight
        weight_VD = weight_VD.to(self._dtype)
        return hidden_ND @ weight_VD.T

    def losses(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The cross entropy of each label [N], fp32; zero for an ignored one."""
        hidden_ND = hidden_ND.to(self._dtype)
        weight_VD = self._module.weight
        weight_VD = weight_VD.to(self._dtype)
        apply: Any = _LabelLosses.apply
        losses_N: Tensor = apply(hidden_ND, weight_VD, label_N)
        return losses_N


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


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
    """From hidden states [N, D], a weight [V, D] and labels [N] to losses [N], chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
        """The losses; where only hidden states need a gradient, that of the losses' sum is kept too."""
        hidden_needed, weight_needed, _ = ctx.needs_input_grad
        ahead = hidden_needed and not weight_needed
        ctx.ahead = ahead
        count = len(label_N)
        losses_N = torch.empty(count, dtype=torch.float32, device=label_N.device)
        if not ahead:
            for part in _chunks(count):
                hidden_CD = hidden_ND[part]
                label_C = label_N[part]
                logits_CV = hidden_CD @ weight_VD.T
                losses_N[part] = chunk_losses(logits_CV, label_C, None)
                del logits_CV  # before those of the next chunk
            ctx.save_for_backward(hidden_ND, weight_VD, label_N)
            return losses_N
        ones_N = torch.ones_like(losses_N)
        gradient_ND = torch.empty_like(hidden_ND)
        for part in _chunks(count):
            hidden_CD = hidden_ND[part]
            label_C = label_N[part]
            ones_C = ones_N[part]
            logits_CV = hidden_CD @ weight_VD.T
            losses_N[part] = chunk_losses(logits_CV, label_C, ones_C)
            gradient_CD = gradient_ND[part]
            torch.mm(logits_CV, weight_VD, out=gradient_CD)
            del logits_CV
        ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The gradients, of which that of the weight is added up in fp32."""
        if ctx.ahead:
            (gradient_ND,) = ctx.saved_tensors
            scaled_ND = gradient_ND * scale_N[:, None]
            scaled_ND = scaled_ND.to(gradient_ND.dtype)
            return scaled_ND, None, None
        hidden_ND, weight_VD, label_N = ctx.saved_tensors
        scale_N = scale_N.contiguous()
        gradient_ND = torch.empty_like(hidden_ND)
        gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for part in _chunks(len(label_N)):
            hidden_CD = hidden_ND[part]
            label_C = label_N[part]
            scale_C = scale_N[part]
            logits_CV = hidden_CD @ weight_VD.T
            chunk_losses(logits_CV, label_C, scale_C)
            gradient_CD = gradient_ND[part]
            torch.mm(logits_CV, weight_VD, out=gradient_CD)
            add_in_fp32(gradient_VD, logits_CV.T, hidden_CD)
            del logits_CV
        gradient_VD = gradient_VD.to(weight_VD.dtype)
        return gradient_ND, gradient_VD, None


def _chunks(count: int) -> Iterator[slice]:
    """The parts in which so many labels are taken."""
    for first in range(0, count, LABELS_AT_ONCE):
        end = first + LABELS_AT_ONCE
        yield slice(first, end)
