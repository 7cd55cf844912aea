"""LoRA that is merged into the base while it trains."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from methods.options.base import Footprint, Fraction, element_count, four_bit_bytes
from methods.options.lora_family import LowRankOptions
from methods.parts.targets import Linears, Matrices, Others


class ReLora(LowRankOptions):
    """LoRA that is merged into the base and started anew, again and again; leaves a whole model."""

    kind: Literal["relora"] = "relora"
    implementation: ClassVar[str] = "methods.relora:ReLoraTuning"
    makes_model: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it for long runs on much text, where one update of rank r is too narrow and AdamW's state for all "
        "weights does not fit. On a small data set take LoRA: restarts need steps enough between them, each costs "
        "a warm-up, and what is left is a whole model, without the reference that preference objectives need."
    )
    refusals: ClassVar[Mapping[str, str]] = {"reference": "what it learns goes into the base; nearest: lora"}

    every: float = Field(
        0.25, gt=0, le=1, description="share of the steps between two merges; 1: one merge, at the end"
    )
    rewarmup: Fraction = Field(
        0.02, description="share of the steps that warm the learning rate up after a merge, less than every"
    )
    keep: Fraction = Field(
        0.0, description="share of the optimizer's state, by magnitude, that outlives a merge; 0: none"
    )
    others: bool = Field(True, description="train embeddings, norms, biases and head too, as the paper does")
    full_rank: Fraction = Field(
        0.0, description="share of the steps that train the weights themselves first; 0: none"
    )
    quantised: bool = Field(False, description="keep linear layers in 4 bits (NF4); a merge quantises them anew")

    @model_validator(mode="after")
    def _check_phases(self) -> "ReLora":
        if self.rewarmup >= self.every:
            raise ValueError(f"found rewarmup {self.rewarmup}; allowed: less than every ({self.every})")
        if self.full_rank and self.quantised:
            raise ValueError(
                "found full_rank with quantised, but weights in 4 bits cannot be trained themselves; "
                "nearest: a job of kind full whose output is the base of this one"
            )
        return self

    @property
    def quantises(self) -> bool:
        """Whether the job asks for a base in 4 bits."""
        return self.quantised

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return self.linear_targets(linears)

    def trained_parameters(self, linears: Linears, others: Others) -> int:
        """The factors, every weight that is no linear layer's, and those too where they are trained first."""
        factors = self.added_parameters(linears, others)
        directly = self._trained_others(others)
        first = self._trained_first(linears)
        return factors + directly + first

    def optimizer_bytes(self, linears: Linears, others: Others) -> Footprint:
        """Two moments of what is trained at a time: factors, or before them the linear layers' weights."""
        factors = self.added_parameters(linears, others)
        first = self._trained_first(linears)
        directly = self._trained_others(others)
        trained_at_a_time = max(factors, first) + directly
        return 8 * trained_at_a_time, 0

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> Footprint:
        """As for LoRA; where it quantises, every worker holds the linear layers in 4 bits."""
        if not self.quantised:
            return super().frozen_bytes(linears, others, element)
        frozen_others = element_count(others) - self._trained_others(others)
        replicated = four_bit_bytes(linears, double=True)
        return frozen_others * element, replicated

    def _trained_others(self, others: Others) -> int:
        """Weights beside the linear layers that are trained themselves."""
        if self.others:
            return element_count(others)
        return 0

    def _trained_first(self, linears: Linears) -> int:
        """Weights of linear layers that are trained before the first factors."""
        if self.full_rank:
            return element_count(linears)
        return 0
