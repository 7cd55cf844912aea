"""The options of every method: plain frozen data, no torch, so that a laptop can validate a job."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What all methods share: a kind, and a default learning rate for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_lr: ClassVar[float]


class Full(Options):
    """Train every weight of the base."""

    kind: Literal["full"] = "full"
    default_lr: ClassVar[float] = 1e-5


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


class Lora(_LowRank):
    """Low-rank update W + (alpha / r) B A."""

    kind: Literal["lora"] = "lora"


class RsLora(_LowRank):
    """LoRA with the rank-stabilised scale alpha / sqrt(r)."""

    kind: Literal["rslora"] = "rslora"


class Dora(_LowRank):
    """LoRA on the direction of each weight column, with a trained magnitude."""

    kind: Literal["dora"] = "dora"


Method = Annotated[Full | Lora | RsLora | Dora, Field(discriminator="kind")]
ALL: tuple[type[Options], ...] = (Full, Lora, RsLora, Dora)
