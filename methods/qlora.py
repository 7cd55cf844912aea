"""QLoRA: dequantise(W4) + (alpha / r) B A, with the base W in 4 bits, NF4 by default, and its constants in 8.

Dettmers et al. 2023, arXiv 2305.14314, equations 5 and 6. The start `loftq` takes A and B from the rank-r SVD of
what quantisation lost, W - dequantise(W4): one iteration of Li et al. 2023, arXiv 2310.08659, algorithm 1, so the
exported adapter fits the plain 4-bit base.

A merge puts the update into the 16-bit weights, which are the trained ones plus an error q = W - dequantise(W4) that
the adapter never saw. NF4 loses about a tenth of W's norm and an update seldom reaches a tenth of it, so q is larger
than the update as a rule, and the merged model is the trained one only as far as q does not matter. Above MERGE_BOUND
times the update in a layer it is refused: there is nothing left to say so. The adapter on the 4-bit base is exact.
The update of `loftq` has q in it, so it is merged into the dequantised weights, exactly.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from methods.base import MergeRefused, ReferenceRefused, Setup
from methods.lora import LowRank
from methods.options.low_rank import QLora
from methods.parts import quantised
from methods.parts.initial import adapted
from methods.parts.peft_adapter import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE_BOUND = 10.0  # ||q|| over ||s B A|| of a layer


class QLoraTuning(LowRank[QLora]):
    """LoRA over a base in 4 bits."""

    def __init__(self, options: QLora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._resumed = False

    def load_options(self, config: Any) -> dict[str, Any]:
        """Have the base quantised while it is read, to compute in its own dtype."""
        return quantised.load_options(self.options.quant, self.options.double_quant, config.dtype)

    def config(self) -> dict[str, Any]:
        """The starts that PEFT draws."""
        return {"init_lora_weights": "gaussian"} if self.options.init == "gaussian" else {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: ARG002
        """Know that the weights will come from a checkpoint."""
        self._resumed = True

    def attach(self, model: "PreTrainedModel") -> nn.Module:
        """Add adapters to the 4-bit base, and keep it from DeepSpeed."""
        if not model.hf_quantizer.pre_quantized:  # one that is in 4 bits already may leave some layers as they are
            quantised.require(model, self.setup.gather)
        tuned = super().attach(model)
        if self.options.init == "loftq" and not self._resumed:
            start_from_loss(tuned)
        quantised.hide(tuned)
        return tuned

    def reference(self, model: nn.Module) -> AbstractContextManager[None]:
        """The 4-bit base alone; refused where the first step left from more than that."""
        if self.options.init == "loftq":
            raise ReferenceRefused("method.init loftq has no reference: the A and B that it starts from are not kept")
        return super().reference(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """The base with the update in its weights; raises MergeRefused where they lost more than it gives."""
        self.merge_report = {name: self._error(layer) for name, layer in adapted(model)}
        worst = max(self.merge_report, key=self.merge_report.__getitem__)
        if not self.merge_report[worst] <= MERGE_BOUND:
            raise MergeRefused(
                f"{worst}: quantisation changed the base {self.merge_report[worst]:.3g} times as much as training"
                f" did; allowed: {MERGE_BOUND:g}. Use the adapter on the 4-bit base that it was trained on"
            )
        return super().merge(model)

    def _error(self, layer: LoraLayer) -> float:
        """||q|| over ||s B A||; for loftq, take q out of the weight."""
        base = layer.get_base_layer()
        weight = base.weight.data.T if quantised.transposed(base) else base.weight.data
        lost = quantised.lost(weight, self.options.quant, self.options.double_quant)
        if self.options.init == "loftq":
            weight.sub_(lost)
            return 0.0
        return float(lost.norm() / layer.get_delta_weight(ADAPTER).detach().float().norm())


def start_from_loss(model: nn.Module) -> None:
    """Set A and B to the best rank-r likeness of what each target lost in quantisation."""
    original = quantised.originals(model.config)
    for name, layer in adapted(model):
        A, B, base = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.get_base_layer()
        whole = original(f"{name.removeprefix('base_model.model.')}.weight")
        lost = (whole.T if quantised.transposed(base) else whole).to(A.device).float() - quantised.restored(
            base.weight
        )
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        root = (S[: len(A)] / layer.scaling[ADAPTER]).sqrt()
        A.data.copy_(root[:, None] * Vh[: len(A)])
        B.data.copy_(U[:, : len(A)] * root)
