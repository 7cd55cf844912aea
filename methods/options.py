"""The options of every method: plain frozen data, no torch, so that a laptop can validate a job."""

from collections.abc import Mapping
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Linears = Mapping[str, tuple[int, int]]  # module name -> (out_features, in_features)
Others = Mapping[str, tuple[int, ...]]  # every other weight: parameter name -> shape


class Options(BaseModel):
    """What all methods share: a kind, and a default learning rate for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_lr: ClassVar[float]

    def adds(self, linears: Linears, others: Others) -> int:
        """How many parameters the method adds to a base of these shapes; raises ValueError for a bad target."""
        raise NotImplementedError

    def trained(self, linears: Linears, others: Others) -> int:
        """How many parameters it trains on a base of these shapes; raises ValueError for a bad target."""
        return self.adds(linears, others)


class Full(Options):
    """Train every weight of the base."""

    kind: Literal["full"] = "full"
    default_lr: ClassVar[float] = 1e-5

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def trained(self, linears: Linears, others: Others) -> int:
        """Every weight."""
        return sum(map(prod, (*linears.values(), *others.values())))


class _LowRank(Options):
    default_lr: ClassVar[float] = 1e-4

    rank: int = Field(16, ge=1, description="rank r of the update B A")
    alpha: float | None = Field(None, gt=0, description="numerator of the update's scale; null: 2 x rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the modules that get an adapter, or all-linear"
    )

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default of twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
        """The modules that get an adapter, with their (out, in); a name stands for every module that ends with it."""
        if self.target == "all-linear":
            return dict(linears)
        matrices = {name.removesuffix(".weight"): shape for name, shape in others.items() if len(shape) == 2}
        candidates = {**linears, **matrices}
        chosen: dict[str, tuple[int, int]] = {}
        for target in self.target:
            found = {name: (s[0], s[1]) for name, s in candidates.items() if f".{name}".endswith(f".{target}")}
            if not found:
                names = sorted({name.rpartition(".")[2] for name in candidates})
                raise ValueError(f"found {target!r}, which the base does not have; allowed: {', '.join(names)}")
            chosen |= found
        return chosen

    def adds(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in} and B in R^{out x r} for every target."""
        return sum(self.rank * (out + in_) for out, in_ in self.targets(linears, others).values())


class Lora(_LowRank):
    """Low-rank update W + (alpha / r) B A."""

    kind: Literal["lora"] = "lora"


class RsLora(_LowRank):
    """LoRA with the rank-stabilised scale alpha / sqrt(r)."""

    kind: Literal["rslora"] = "rslora"


class Dora(_LowRank):
    """LoRA on the direction of each weight column, with a trained magnitude."""

    kind: Literal["dora"] = "dora"

    def adds(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a magnitude in R^{out} for every target."""
        return super().adds(linears, others) + sum(out for out, _ in self.targets(linears, others).values())


Method = Annotated[Full | Lora | RsLora | Dora, Field(discriminator="kind")]
ALL: tuple[type[Options], ...] = (Full, Lora, RsLora, Dora)
