"""DoRA: m * (W + s B A) / ||W + s B A||_c, the norm by output row and detached.

Liu et al. 2024, arXiv 2402.09353, equation 5 (and section 4.3 for the detached norm).
The magnitude m in R^{out} starts as ||W||_c, so the first step leaves from the base.
"""

from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.nn import Linear
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

    def speed_up(self, model: Any, undo: ExitStack, sharded: bool = False) -> None:
        """Find the norms of all modules from the factors, once a pass.

        PEFT makes the sum of base and update, as large as the base, for each module. Where weights are sharded it
        goes on so: the norms of all modules take all weights at a time.
        """
        if sharded:
            return
        adapted = []
        for module in model.modules():
            if isinstance(module, LoraLayer) and type(module.get_base_layer()) is Linear:
                adapted.append(module)
        if not adapted:
            return
        norms = NormsFromFactors(adapted)
        for module in adapted:
            magnitude = module.lora_magnitude_vector[ADAPTER]
            # A class, and no attribute of the module: so all layers share one compilation.
            undo.callback(setattr, magnitude, "__class__", type(magnitude))
            undo.callback(delattr, magnitude, "norms")
            magnitude.__class__ = GivenNorms
        norms.give()
        decoder = model.get_decoder()
        hook = decoder.register_forward_pre_hook(norms.give)
        undo.callback(hook.remove)


class NormsFromFactors:
    """The norms ||W + s B A||_c of adapted linear layers, of whose bases it keeps the squares."""

    def __init__(self, modules: list[LoraLayer]) -> None:
        self._modules = modules
        self._bases: list[Tensor] = []
        self._squares: list[Tensor] = []
        for module in modules:
            base_OI = module.get_base_layer().weight
            norm_O = torch.linalg.vector_norm(base_OI, dim=1, dtype=torch.float32)
            self._bases.append(base_OI)
            self._squares.append(norm_O.square())

    @torch.no_grad()
    def give(self, *_: Any) -> None:
        """Give each module those of the factors as they are now; a hook before the decoder's forward pass."""
        a = []
        b = []
        scales = []
        for module in self._modules:
            a.append(module.lora_A[ADAPTER].weight)
            b.append(module.lora_B[ADAPTER].weight)
            scales.append(module.scaling[ADAPTER])
        norms = row_norms(self._bases, a, b, self._squares, scales)
        outputs = list(map(len, self._bases))
        norms_of_each = norms.split(outputs)
        for module, norm_O in zip(self._modules, norms_of_each, strict=True):
            magnitude = module.lora_magnitude_vector[ADAPTER]
            magnitude.norms = norm_O


class GivenNorms(DoraLinearLayer):  # type: ignore[misc]
    """What DoRA adds to the output of a linear layer, as PEFT's module does, with norms [O] that it is given."""

    norms: Tensor

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
        share_O: Tensor = self.weight / self.norms
        if base_result is None:  # x has gone through dropout
            base_result = linear(x, base_layer.weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        update: Tensor = lora_B(lora_A(x))
        return (share_O - 1) * base_result + share_O * update * scaling
