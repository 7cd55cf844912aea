"""The LoRA family: updates that are products of two narrow matrices."""

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from methods.options.base import WEIGHTS_EXPONENT, Targeted, packed, plain_attention, positions, size, window
from methods.parts.targets import Linears, Others, Target, choose


class LowRankOptions(Targeted):
    """What the LoRA family shares."""

    default_lr: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    rank: int = Field(16, ge=1, description="rank r of the update B A")
    alpha: float | None = Field(None, gt=0, description="numerator of the update's scale; null: 2 x rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A")

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default of twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def adds(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in} and B in R^{out x r} for every target."""
        return sum(self.rank * (out + in_) for out, in_ in self.targets(linears, others).values())


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
    def _halves(self) -> "Lora":
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"found rank {self.rank} with init orthogonal; allowed: an even rank")
        return self

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
        """The modules that get an adapter; raises ValueError where the start has no meaning for one."""
        if self.init in ("default", "gaussian"):
            return super().targets(linears, others)
        chosen = choose(self.target, self.exclude, linears, {})
        _check_directions(self, chosen)
        return chosen

    def check_in_4_bits(self, quantization: Mapping[str, Any]) -> None:  # noqa: ARG002
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

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a magnitude in R^{out} for every target."""
        return super().adds(linears, others) + sum(out for out, _ in self.targets(linears, others).values())


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

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in); all linear layers are in 4 bits."""
        chosen = choose(self.target, self.exclude, linears, {})
        _check_directions(self, chosen)
        return chosen

    @property
    def quantises(self) -> bool:
        """It does."""
        return True

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> tuple[int, int]:
        """Every worker holds the linear layers in 4 bits; ZeRO 3 shares the rest."""
        return size(others) * element, packed(linears, self.double_quant)

    def check_in_4_bits(self, quantization: Mapping[str, Any]) -> None:
        """The base keeps its own 4 bits, and what it lost on the way to them is not known."""
        if self.init == "loftq":
            raise ValueError("method.init: found loftq, which needs the unquantised weights; allowed: default")
        found = quantization.get("bnb_4bit_quant_type", "fp4")
        if self.quant != found:
            raise ValueError(f"method.quant: found {self.quant}; allowed: {found}, which the base has")


class AdaLora(Targeted):
    """Low-rank update B diag(E) A whose ranks are chosen while it trains."""

    kind: Literal["adalora"] = "adalora"
    implementation: ClassVar[str] = "methods.adalora:AdaLoraTuning"
    default_lr: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    on_4_bits: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="average rank at the end")
    initial_rank: int = Field(12, ge=1, description="rank of every module at the start")
    alpha: float = Field(32.0, gt=0, description="numerator of the update's scale")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks are cut")
    final: float = Field(0.3, ge=0, lt=1, description="share of the steps after the last cut")
    every: int = Field(10, ge=1, description="steps between two cuts")
    beta1: float = Field(0.85, gt=0, lt=1, description="averaging of the importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="averaging of its uncertainty")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty that keeps A and B orthogonal")

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdaLora":
        if self.rank > self.initial_rank:
            raise ValueError(f"found rank {self.rank} above initial_rank {self.initial_rank}")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final together must leave steps in which ranks are cut")
        return self

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in}, B in R^{out x r} and E in R^r for every target, at the initial rank."""
        return sum(self.initial_rank * (out + in_ + 1) for out, in_ in self.targets(linears, others).values())


class LongLora(LowRankOptions):
    """LoRA with shifted sparse attention for long sequences; embeddings and norms are trained too."""

    kind: Literal["longlora"] = "longlora"
    implementation: ClassVar[str] = "methods.longlora:LongLoraTuning"
    on_4_bits: ClassVar[bool] = True

    target: Target = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="modules that get an adapter by name, or all-linear"
    )
    rank: int = Field(8, ge=1, description="rank r of the update B A")
    groups: int = Field(4, ge=1, description="parts of seq_len within which heads attend; 1: dense attention")
    rope: Literal["linear", "yarn"] = Field("linear", description="how positions beyond the base's are reached")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter: embeddings are trained themselves."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a trained copy of each embedding and norm."""
        return super().adds(linears, others) + sum(prod(s) for name, s in others.items() if self.copies(name))

    def copies(self, name: str) -> bool:
        """Whether a copy of this weight, which is no linear layer's, is trained."""
        return "embed" in name or "norm" in name

    def check(self, config: Mapping[str, Any], seq_len: int) -> None:
        """Beyond the base's positions it goes where nothing scales the rotary frequencies yet."""
        if self.groups > 1:
            plain_attention(config, self.kind, "lora")
            seen = window(config)
            if seen is not None and ceil(seq_len / self.groups) > seen:
                allowed = f"at most {seen * self.groups}, in {self.groups} groups of the {seen} tokens"
                raise ValueError(f"data.seq_len: found {seq_len}; allowed: {allowed} that the base's attention sees")
        known = positions(config)
        if known is not None and seq_len > known and _is_scaled(config):
            raise ValueError(
                f"data.seq_len: found {seq_len}; allowed: at most {known} (the base's positions are scaled already)"
            )


class ReLora(LowRankOptions):
    """LoRA that is merged into the base and started anew, again and again; leaves a whole model."""

    kind: Literal["relora"] = "relora"
    implementation: ClassVar[str] = "methods.relora:ReLoraTuning"
    makes_model: ClassVar[bool] = True
    refusals: ClassVar[Mapping[str, str]] = {"reference": "what it learns goes into the base; nearest: lora"}

    every: float = Field(0.25, gt=0, le=1, description="share of the steps between two merges")
    rewarmup: float = Field(0.02, ge=0, lt=1, description="share of the steps of warm-up after a merge")
    keep: float = Field(0.0, ge=0, lt=1, description="share of the optimizer's state that outlives a merge")
    others: bool = Field(True, description="train embeddings, norms, biases and head too, as the paper does")
    full_rank: float = Field(
        0.0, ge=0, lt=1, description="share of the steps that train the weights themselves first"
    )
    quantised: bool = Field(False, description="keep linear layers in 4 bits (NF4); a merge quantises them anew")

    @model_validator(mode="after")
    def _fits(self) -> "ReLora":
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
        """Where it is asked to."""
        return self.quantised

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """As for LoRA, but linear layers alone."""
        return choose(self.target, self.exclude, linears, {})

    def trained(self, linears: Linears, others: Others) -> int:
        """The factors, every weight that is no linear layer's, and those too where they are trained first."""
        return self.adds(linears, others) + self._directly(others) + (size(linears) if self.full_rank else 0)

    def optimizer_bytes(self, linears: Linears, others: Others) -> tuple[int, int]:
        """Two moments of what is trained at a time: factors, or before them the linear layers' weights."""
        most = max(self.adds(linears, others), size(linears) if self.full_rank else 0)
        return 8 * (most + self._directly(others)), 0

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> tuple[int, int]:
        """As for LoRA; where it quantises, every worker holds the linear layers in 4 bits."""
        if not self.quantised:
            return super().frozen_bytes(linears, others, element)
        return (size(others) - self._directly(others)) * element, packed(linears, double=True)

    def _directly(self, others: Others) -> int:
        return size(others) if self.others else 0


def _check_directions(options: Lora | QLora, chosen: Linears) -> None:
    """Raise ValueError where a start from singular vectors asks for more than a matrix has."""
    for name, shape in chosen.items() if options.init in ("pissa", "olora", "eva", "loftq") else ():
        if options.rank > min(shape):
            raise ValueError(f"found rank {options.rank} for init {options.init}; {name} has {min(shape)} directions")


def _is_scaled(config: Mapping[str, Any]) -> bool:
    """Whether a base's config.json scales rotary frequencies, or has several kinds of them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = any(isinstance(value, Mapping) for value in rope.values())
    return nested or rope.get("rope_type", rope.get("type", "default")) != "default"
