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

from peft.tuners.lora import LoraLayer
from torch.nn import Module

from methods.base import Keywords, MergeRefused, ReferenceRefused, Setup, Tensors
from methods.lora import LowRank
from methods.options.low_rank import QLora
from methods.parts import quantised
from methods.parts.initial import adapted, principal_factors
from methods.parts.peft_adapter import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE_BOUND = 10.0  # ||q|| over ||s B A|| of a layer


class QLoraTuning(LowRank[QLora]):
    """LoRA over a base whose linear layers are in 4 bits."""

    def __init__(self, options: QLora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._resumed = False

    def load_options(self, config: Any) -> Keywords:
        """Have the base quantised while it is read, to compute in its own dtype."""
        options = self.options
        return quantised.load_options(options.quant, options.double_quant, config.dtype)

    def config(self) -> Keywords:
        """Name the start to PEFT where PEFT draws it."""
        if self.options.init == "gaussian":
            return {"init_lora_weights": "gaussian"}
        return {}

    def load_state(self, state: Tensors) -> None:  # noqa: ARG002
        """Know that the weights will come from a checkpoint."""
        self._resumed = True

    def attach(self, model: "PreTrainedModel") -> Module:
        """Add adapters to the 4-bit base, and keep it from DeepSpeed."""
        if not model.hf_quantizer.pre_quantized:  # one that is in 4 bits already may leave some layers as they are
            quantised.require(model, self.setup.gather)
        tuned = super().attach(model)
        if self.options.init == "loftq" and not self._resumed:
            start_from_loss(tuned)
        quantised.register_as_buffers(tuned)
        return tuned

    def reference(self, model: Module) -> AbstractContextManager[None]:
        """The 4-bit base alone; refused where the first step left from more than that."""
        if self.options.init == "loftq":
            raise ReferenceRefused("method.init loftq has no reference: the A and B that it starts from are not kept")
        return super().reference(model)

    def merge(self, model: Module) -> Module:
        """The base with the update in its weights; raises MergeRefused where they lost more than it gives."""
        errors = {name: self._error(layer) for name, layer in adapted(model)}
        self.merge_report = errors
        worst = max(errors, key=errors.__getitem__)
        error = errors[worst]
        if not error <= MERGE_BOUND:  # also where it is NaN
            raise MergeRefused(
                f"{worst}: quantisation changed the base {error:.3g} times as much as training"
                f" did; allowed: {MERGE_BOUND:g}. Use the adapter on the 4-bit base that it was trained on"
            )
        return super().merge(model)

    def _error(self, layer: LoraLayer) -> float:
        """||q|| over ||s B A||; for loftq, take q out of the weight."""
        options = self.options
        base = layer.get_base_layer()
        weight_OI = quantised.oriented(base, base.weight.data)
        lost_OI = quantised.quantisation_error(weight_OI, options.quant, options.double_quant)
        if options.init == "loftq":
            weight_OI.sub_(lost_OI)
            return 0.0
        update = layer.get_delta_weight(ADAPTER)
        update = update.detach().float()
        ratio = lost_OI.norm() / update.norm()
        return float(ratio)


def start_from_loss(model: Module) -> None:
    """Set A and B to the best rank-r likeness of what each target lost in quantisation."""
    original = quantised.originals(model.config)
    for name, layer in adapted(model):
        a_RI = layer.lora_A[ADAPTER].weight
        b_OR = layer.lora_B[ADAPTER].weight
        base = layer.get_base_layer()
        base_name = name.removeprefix("base_model.model.")
        weight = original(f"{base_name}.weight")
        weight_OI = quantised.oriented(base, weight)
        weight_OI = weight_OI.to(a_RI.device).float()
        lost_OI = weight_OI - quantised.dequantised(base.weight)
        rank = len(a_RI)
        scale = layer.scaling[ADAPTER]
        start_a_RI, start_b_OR = principal_factors(lost_OI, rank, scale)
        a_RI.data.copy_(start_a_RI)
        b_OR.data.copy_(start_b_OR)
