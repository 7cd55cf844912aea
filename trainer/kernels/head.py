"""The cross entropy of labels from hidden states: the logits of a chunk of labels are held, never those of all.

Where the head is frozen, the gradient of a chunk's hidden states is found in the forward pass, while its logits are
there; else they are computed again in the backward pass. Shapes: N labels, C of a chunk, D hidden size, V tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.layout import IGNORED

LABELS_AT_ONCE = 2048


class Head:
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

    def losses(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The cross entropy of each label [N], fp32; zero for an ignored one."""
        hidden_ND = hidden_ND.to(self._dtype)
        weight_VD = self._module.weight.to(self._dtype)
        losses_N: Tensor = _LabelLosses.apply(hidden_ND, weight_VD, label_N)
        return losses_N


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _chunk_losses(hidden_CD: Tensor, weight_VD: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [C] of a chunk, its logits [C, V], and the logarithms [C] of the sums of their exponentials."""
    logits_CV = hidden_CD @ weight_VD.T
    fp32_CV = logits_CV.float()
    sums_C = fp32_CV.logsumexp(1)
    known_C = label_C.clamp_min(0)
    picked_C1 = fp32_CV.gather(1, known_C[:, None])
    losses_C = sums_C - picked_C1[:, 0]
    losses_C = torch.where(label_C == IGNORED, 0.0, losses_C)
    return losses_C, logits_CV, sums_C


def _slopes(logits_CV: Tensor, sums_C: Tensor, label_C: Tensor, scale_C: Tensor) -> Tensor:
    """The gradients [C, V] of losses that are each multiplied by a scale, in the dtype of the logits."""
    token_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_label_CV = token_V == label_C[:, None]
    share_CV = (logits_CV.float() - sums_C[:, None]).exp()
    slope_CV = torch.where(is_label_CV, share_CV - 1, share_CV)
    weight_C = torch.where(label_C == IGNORED, 0.0, scale_C)
    slope_CV = slope_CV * weight_C[:, None]
    return slope_CV.to(logits_CV.dtype)


@torch.compile(dynamic=True)
def _losses_alone(hidden_CD: Tensor, weight_VD: Tensor, label_C: Tensor) -> Tensor:
    """The losses of a chunk."""
    losses_C, *_ = _chunk_losses(hidden_CD, weight_VD, label_C)
    return losses_C


@torch.compile(dynamic=True)
def _losses_and_gradient(hidden_CD: Tensor, weight_VD: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, and the gradient of their sum for its hidden states."""
    losses_C, logits_CV, sums_C = _chunk_losses(hidden_CD, weight_VD, label_C)
    slope_CV = _slopes(logits_CV, sums_C, label_C, torch.ones_like(sums_C))
    return losses_C, slope_CV @ weight_VD


@torch.compile(dynamic=True)
def _gradients(hidden_CD: Tensor, weight_VD: Tensor, label_C: Tensor, scale_C: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a chunk's scaled losses for its hidden states and for the weight."""
    _, logits_CV, sums_C = _chunk_losses(hidden_CD, weight_VD, label_C)
    slope_CV = _slopes(logits_CV, sums_C, label_C, scale_C)
    return slope_CV @ weight_VD, slope_CV.T @ hidden_CD


class _LabelLosses(torch.autograd.Function):
    """From hidden states [N, D], a weight [V, D] and labels [N] to losses [N], chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
        """The losses; where only hidden states need a gradient, that of the losses' sum is kept too."""
        hidden_needed, weight_needed, _ = ctx.needs_input_grad
        ahead = hidden_needed and not weight_needed
        losses = []
        gradients = []
        chunks = zip(hidden_ND.split(LABELS_AT_ONCE), label_N.split(LABELS_AT_ONCE), strict=True)
        for hidden_CD, label_C in chunks:
            if ahead:
                losses_C, gradient_CD = _losses_and_gradient(hidden_CD, weight_VD, label_C)
                gradients.append(gradient_CD)
            else:
                losses_C = _losses_alone(hidden_CD, weight_VD, label_C)
            losses.append(losses_C)
        if ahead:
            ctx.save_for_backward(torch.cat(gradients))
        else:
            ctx.save_for_backward(hidden_ND, weight_VD, label_N)
        ctx.ahead = ahead
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        """The gradients, of which that of the weight is added up in fp32."""
        if ctx.ahead:
            (gradient_ND,) = ctx.saved_tensors
            scaled_ND = gradient_ND * scale_N[:, None]
            return scaled_ND.to(gradient_ND.dtype), None, None
        hidden_ND, weight_VD, label_N = ctx.saved_tensors
        weight_gradient = torch.zeros_like(weight_VD, dtype=torch.float32)
        gradients = []
        parts = (hidden_ND.split(LABELS_AT_ONCE), label_N.split(LABELS_AT_ONCE), scale_N.split(LABELS_AT_ONCE))
        for hidden_CD, label_C, scale_C in zip(*parts, strict=True):
            gradient_CD, of_weight_VD = _gradients(hidden_CD, weight_VD, label_C, scale_C)
            gradients.append(gradient_CD)
            weight_gradient += of_weight_VD
        return torch.cat(gradients), weight_gradient.to(weight_VD.dtype), None
