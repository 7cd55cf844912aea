"""The LoRA family: updates that are products of two narrow matrices."""

from collections.abc import Mapping
from math import ceil, prod
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
    known_positions,
    plain_attention,
    window,
)
from methods.options.lora_family import LowRankOptions, check_directions, is_scaled
from methods.parts.targets import Linears, Matrices, Others, Target, inputs, outputs


class Lora(LowRankOptions):
    """Low-rank update W + (alpha / r) B A."""

    kind: Literal["lora"] = "lora"
    implementation: ClassVar[str] = "methods.lora:LoraTuning"
    on_4_bits: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = Field(
        "default", description="how A and B start: Kaiming and zero, or from the base's (eva: the data's) directions"
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


class Dora(LowRankOptions):
    """LoRA on the direction of each weight column, with a trained magnitude."""

    kind: Literal["dora"] = "dora"
    implementation: ClassVar[str] = "methods.dora:DoraTuning"
    trains_new_tokens: ClassVar[bool] = True

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
    on_4_bits: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True

    quant: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the base")
    double_quant: bool = Field(True, description="quantise the quantisation constants too")
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

    rank: Count = Field(8, description="average rank at the end")
    initial_rank: Count = Field(12, description="rank of every module at the start")
    alpha: Positive = Field(32.0, description="numerator of the update's scale")
    dropout: Fraction = Field(0.0, description="dropout on the adapter's input")
    warmup: Fraction = Field(0.1, description="share of the steps before ranks are cut")
    final: Fraction = Field(0.3, description="share of the steps after the last cut")
    every: Count = Field(10, description="steps between two cuts")
    beta1: float = Field(0.85, gt=0, lt=1, description="averaging of the importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="averaging of its uncertainty")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty that keeps A and B orthogonal")

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


class LongLora(LowRankOptions):
    """LoRA with shifted sparse attention for long sequences; embeddings and norms are trained too."""

    kind: Literal["longlora"] = "longlora"
    implementation: ClassVar[str] = "methods.longlora:LongLoraTuning"
    on_4_bits: ClassVar[bool] = True

    target: Target = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="modules that get an adapter by name, or all-linear"
    )
    rank: Count = Field(8, description="rank r of the update B A")
    groups: Count = Field(4, description="parts of seq_len within which heads attend; 1: dense attention")
    rope: Literal["linear", "yarn"] = Field("linear", description="how positions beyond the base's are reached")

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter: embeddings are trained themselves."""
        return self.linear_targets(linears)

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a trained copy of each embedding and norm."""
        total = super().added_parameters(linears, others)
        for name, shape in others.items():
            if self.copies(name):
                total += prod(shape)
        return total

    def copies(self, name: str) -> bool:
        """Whether a copy of this weight, which is no linear layer's, is trained."""
        return "embed" in name or "norm" in name

    def check(self, config: BaseConfig, seq_len: int) -> None:
        """Beyond the base's positions it goes where nothing scales the rotary frequencies yet."""
        if self.groups > 1:
            plain_attention(config, self.kind, "lora")
            self._check_window(config, seq_len)
        known = known_positions(config)
        if known is None or seq_len <= known:
            return
        if is_scaled(config):
            raise ValueError(
                f"data.seq_len: found {seq_len}; allowed: at most {known} (the base's positions are scaled already)"
            )

    def _check_window(self, config: BaseConfig, seq_len: int) -> None:
        """Raise ValueError where a group is longer than what the base's attention sees."""
        visible = window(config)
        if visible is None:
            return
        group = ceil(seq_len / self.groups)
        if group > visible:
            most = visible * self.groups
            allowed = f"at most {most}, in {self.groups} groups of the {visible} tokens"
            raise ValueError(f"data.seq_len: found {seq_len}; allowed: {allowed} that the base's attention sees")


class ReLora(LowRankOptions):
    """LoRA that is merged into the base and started anew, again and again; leaves a whole model."""

    kind: Literal["relora"] = "relora"
    implementation: ClassVar[str] = "methods.relora:ReLoraTuning"
    makes_model: ClassVar[bool] = True
    refusals: ClassVar[Mapping[str, str]] = {"reference": "what it learns goes into the base; nearest: lora"}

    every: float = Field(0.25, gt=0, le=1, description="share of the steps between two merges")
    rewarmup: Fraction = Field(0.02, description="share of the steps of warm-up after a merge")
    keep: Fraction = Field(0.0, description="share of the optimizer's state that outlives a merge")
    others: bool = Field(True, description="train embeddings, norms, biases and head too, as the paper does")
    full_rank: Fraction = Field(0.0, description="share of the steps that train the weights themselves first")
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
        """As for LoRA, but linear layers alone."""
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
