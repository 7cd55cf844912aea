"""DoRA: m * (W + s B A) / ||W + s B A||_c, the norm by output row and detached.

Liu et al. 2024, arXiv 2402.09353, equation 5 (and section 4.3 for the detached norm).
The magnitude m in R^{out} starts as ||W||_c, so the first step leaves from the base.
"""

from contextlib import ExitStack

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear

from methods.base import Keywords
from methods.lora import LowRank
from methods.options.low_rank import Dora
from methods.parts.peft_adapter import ADAPTER


class DoraTuning(LowRank[Dora]):
    """LoRA on weights that are decomposed into magnitude and direction."""

    def config(self) -> Keywords:
        """Ask PEFT to decompose weights into magnitude and direction."""
        return {"use_dora": True}

    def speed_up(self, model: Module, undo: ExitStack) -> None:
        """Find the norms from the factors, where PEFT makes the sum of base and update, as large as the base."""
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            base = module.get_base_layer()
            if type(base) is Linear:
                magnitude = module.lora_magnitude_vector[ADAPTER]
                magnitude.forward = _FromFactors(magnitude, base)
                undo.callback(delattr, magnitude, "forward")


class _FromFactors:
    """What DoRA adds to the output of a linear layer, as PEFT's module does, with norms from the factors.

    ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o: products as narrow as
    the rank, beside the norms of the base's rows, which stay what they are.
    """

    def __init__(self, magnitude: DoraLinearLayer, base: Linear) -> None:
        self._magnitude = magnitude
        norm_O = torch.linalg.vector_norm(base.weight, dim=1, dtype=torch.float32)
        self._squares_O = norm_O.square()

    def __call__(
        self,
        x: Tensor,
        *,
        lora_A: Linear,
        lora_B: Linear,
        scaling: float,
        base_layer: Linear,
        base_result: Tensor | None = None,
        adapter_name: str = ADAPTER,  # noqa: ARG002
    ) -> Tensor:
        """(m / norm - 1) W x + m / norm s B A x, to be added to what the base gave of x before dropout."""
        norm_O = self._norms(base_layer.weight, lora_A.weight, lora_B.weight, scaling)
        share_O: Tensor = self._magnitude.weight / norm_O
        if base_result is None:  # x has gone through dropout
            base_result = linear(x, base_layer.weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        update: Tensor = lora_B(lora_A(x))
        return (share_O - 1) * base_result + share_O * update * scaling

    @torch.no_grad()
    def _norms(self, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        """The norms [out] of the rows of W + s B A, fp32."""
        along_OR = linear(weight_OI, a_RI)
        gram_RR = linear(a_RI, a_RI)
        both_OR = linear(b_OR, gram_RR)
        cross_O = (along_OR * b_OR).sum(1)
        update_O = (both_OR * b_OR).sum(1)
        square_O: Tensor = self._squares_O + 2 * scale * cross_O + scale**2 * update_O
        return square_O.clamp_min(0).sqrt()
