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
from methods.parts.row_norms import row_norms


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
                _find_norms_from_factors(magnitude, base, undo)


def _find_norms_from_factors(magnitude: Module, base: Linear, undo: ExitStack) -> None:
    """Let PEFT's module of a magnitude find norms from the factors, and `undo` what makes it PEFT's again."""
    norm_O = torch.linalg.vector_norm(base.weight, dim=1, dtype=torch.float32)
    square_O = norm_O.square()
    magnitude.register_buffer("squares", square_O, persistent=False)
    undo.callback(delattr, magnitude, "squares")
    # A class, and no attribute of the module: so all layers share one compilation.
    undo.callback(setattr, magnitude, "__class__", type(magnitude))
    magnitude.__class__ = _FromFactors


class _FromFactors(DoraLinearLayer):  # type: ignore[misc]
    """What DoRA adds to the output of a linear layer, as PEFT's module does, with norms from the factors.

    `squares` are those of the norms of the base's rows, which stay what they are.
    """

    squares: Tensor

    def forward(
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
        with torch.no_grad():
            norm_O = row_norms(base_layer.weight, lora_A.weight, lora_B.weight, self.squares, scaling)
        share_O: Tensor = self.weight / norm_O
        if base_result is None:  # x has gone through dropout
            base_result = linear(x, base_layer.weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        update: Tensor = lora_B(lora_A(x))
        return (share_O - 1) * base_result + share_O * update * scaling
