"""The LoRA family: updates that are products of two narrow matrices."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from methods.options.base import (
    WEIGHTS_EXPONENT,
    BaseConfig,
    Count,
    Footprint,
    Fraction,
    Positive,
    Targeted,
    element_count,
    four_bit_bytes,
)
from methods.options.lora_family import TUNED_RATE, LowRankOptions, check_directions
from methods.parts.targets import Linears, Matrices, Others, inputs, outputs


class Lora(LowRankOptions):
    """Low-rank update W + (alpha / r) B A."""

    kind: Literal["lora"] = "lora"
    implementation: ClassVar[str] = "methods.lora:LoraTuning"
    default_lr: ClassVar[float] = TUNED_RATE
    falls_beyond_width: ClassVar[bool] = False
    on_4_bits: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it first: it is what the other methods are measured by, and at tuned learning rates its variants "
        "were within 1 or 2 % of it (arXiv 2602.04998). Raise the rank before you change the method. Take qlora "
        "where the base does not fit in 16 bits, and full where there is more to learn than a narrow update "
        "holds."
    )

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = Field(
        "default",
        description="how A and B start: Kaiming and zero, or from the base's (eva: the data's) directions",
    )

    @model_validator(mode="after")
    def _check_rank(self) -> "Lora":
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"found rank {self.rank} with init orthogonal; allowed: an even rank")
        return self

    def targets(self, linears: Linears, others: Others) -> Matrices:
        """The modules that get an adapter; raises ValueError where the start has no meaning for one."""
        if self.init in ("default", "gaussian"):
            return super().targets(linears, others)
        chosen = self.linear_targets(linears)
        check_directions(self, chosen)
        return chosen

    def check_in_4_bits(self, quantization: BaseConfig) -> None:  # noqa: ARG002
        """A start that takes its directions out of the base would have to write into its weights."""
        if self.init in ("pissa", "olora", "eva"):
            raise ValueError(f"method.init: found {self.init}; allowed: default, gaussian or orthogonal")


class RsLora(LowRankOptions):
    """LoRA with the rank-stabilised scale alpha / sqrt(r)."""

    kind: Literal["rslora"] = "rslora"
    implementation: ClassVar[str] = "methods.rslora:RsLoraTuning"
    on_4_bits: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it for ranks of 64 and more, where LoRA with a fixed alpha learns too slowly. At equal alpha its "
        "update is sqrt(r) times LoRA's, which acts like a higher learning rate: compare the two at rates of "
        "their own, or the gain that you see is that of the rate. At rank 16 and below LoRA at a higher rate does "
        "the same."
    )


class Dora(LowRankOptions):
    """LoRA on the direction of each weight column, with a trained magnitude."""

    kind: Literal["dora"] = "dora"
    implementation: ClassVar[str] = "methods.dora:DoraTuning"
    default_lr: ClassVar[float] = TUNED_RATE
    falls_beyond_width: ClassVar[bool] = False
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where adapters must be of a low rank (4 to 8), and training may take longer. At tuned learning "
        "rates LoRA's variants were within 1 or 2 % of it (arXiv 2602.04998), and a step here takes one and a "
        "half times as long, at a peak of memory that is half as high again. Not on a base in 4 bits."
    )

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return self.linear_targets(linears)

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a magnitude in R^{out} for every target."""
        factors = super().added_parameters(linears, others)
        chosen = self.targets(linears, others)
        magnitudes = outputs(chosen)
        return factors + magnitudes


class QLora(LowRankOptions):
    """LoRA over a base in 4 bits."""

    kind: Literal["qlora"] = "qlora"
    implementation: ClassVar[str] = "methods.qlora:QLoraTuning"
    default_lr: ClassVar[float] = TUNED_RATE
    falls_beyond_width: ClassVar[bool] = False
    on_4_bits: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where the base in 16 bits leaves no memory for activations: its linear layers need about a "
        "quarter of the bytes. Where 16 bits fit, take LoRA: the base in 4 bits is a slightly worse model, steps "
        "are no faster, and a merge into 16-bit weights is refused where quantisation changed a layer ten times "
        "as much as training."
    )

    quant: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the base's linear layers")
    double_quant: bool = Field(
        True, description="quantise the constants of quantisation too: 0.37 bits less for each weight"
    )
    init: Literal["default", "gaussian", "loftq"] = Field(
        "default", description="how A and B start; loftq: from what quantisation lost"
    )

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in); all linear layers are in 4 bits."""
        chosen = self.linear_targets(linears)
        check_directions(self, chosen)
        return chosen

    @property
    def quantises(self) -> bool:
        """True: the base's linear layers are loaded in 4 bits."""
        return True

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> Footprint:
        """Every worker holds the linear layers in 4 bits; ZeRO 3 shares the rest."""
        shared = element_count(others) * element
        replicated = four_bit_bytes(linears, self.double_quant)
        return shared, replicated

    def check_in_4_bits(self, quantization: BaseConfig) -> None:
        """The base keeps its own 4 bits, and what it lost on the way to them is not known."""
        if self.init == "loftq":
            raise ValueError("method.init: found loftq, which needs the unquantised weights; allowed: default")
        quant = quantization.get("bnb_4bit_quant_type", "fp4")
        if self.quant != quant:
            raise ValueError(f"method.quant: found {self.quant}; allowed: {quant}, which the base has")


class AdaLora(Targeted):
    """Low-rank update B diag(E) A whose ranks are chosen while it trains."""

    kind: Literal["adalora"] = "adalora"
    implementation: ClassVar[str] = "methods.adalora:AdaLoraTuning"
    default_lr: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where the size of the adapter is fixed and modules may need it unequally: it moves a budget of "
        "ranks to those where they count. The schedule of cuts must suit the number of steps, and the best "
        "learning rate is not LoRA's: at LoRA's rate it was ten points behind it in PEFT's method_comparison. In "
        "doubt take LoRA."
    )

    rank: Count = Field(8, description="average rank of a module at the end, at most initial_rank")
    initial_rank: Count = Field(12, description="rank of every module at the start")
    alpha: Positive = Field(32.0, description="numerator of the update's scale")
    dropout: Fraction = Field(0.0, description="probability with which an entry of the adapter's input is dropped")
    warmup: Fraction = Field(0.1, description="share of the steps before ranks are cut")
    final: Fraction = Field(0.3, description="share of the steps after the last cut")
    every: Count = Field(10, description="steps between two cuts of ranks")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay rate of the average importance of a weight")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay rate of the average uncertainty of that importance")
    orthogonality: float = Field(
        0.5, ge=0, description="weight of the penalty that keeps A and B orthogonal; 0: none"
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "AdaLora":
        if self.rank > self.initial_rank:
            raise ValueError(f"found rank {self.rank} above initial_rank {self.initial_rank}")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final together must leave steps in which ranks are cut")
        return self

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return self.linear_targets(linears)

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in}, B in R^{out x r} and E in R^r for every target, at the initial rank."""
        chosen = self.targets(linears, others)
        features = outputs(chosen) + inputs(chosen)
        width = features + len(chosen)
        return self.initial_rank * width
