"""What the options of the LoRA family share: rank, scale, dropout and LoRA+."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from pydantic import Field

from methods.options.base import WEIGHTS_EXPONENT, BaseConfig, Count, Fraction, Positive, Targeted
from methods.parts.targets import Linears, Others, inputs, outputs

# Of LoRA at a scale of 2: 0.4 % above the best test loss on average over 22 bases from a width of 2048 on, and 1 % at
# worst (Tinker's cookbook, chat_sl/results/sft_sweep.md, August 2026).
TUNED_RATE = 4e-4
STARTS_FROM_DIRECTIONS = ("pissa", "olora", "eva", "loftq")


class LowRankOptions(Targeted):
    """Options of methods that train factors A in R^{r x in} and B in R^{out x r} for each target."""

    default_lr: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    rank: Count = Field(16, description="rank r of the update B A, the same for every module")
    alpha: float | None = Field(None, gt=0, description="numerator of the update's scale; null: 2 x rank")
    dropout: Fraction = Field(0.0, description="probability with which an entry of the adapter's input is dropped")
    lr_ratio: Positive = Field(1.0, description="LoRA+: learning rate of B over that of A; 1: both have train.lr")

    @property
    def alpha_in_use(self) -> float:
        """Alpha, with its default of twice the rank."""
        if self.alpha is not None:
            return self.alpha
        return 2.0 * self.rank

    @property
    def scale_numerator(self) -> float:
        """What PEFT divides by the rank (by its root, with `use_rslora`) for the scale of the update: alpha."""
        return self.alpha_in_use

    def in_use(self) -> dict[str, Any]:
        """The options as they are used, with the number that alpha stands for."""
        options = super().in_use()
        options["alpha"] = self.alpha_in_use
        return options

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in} and B in R^{out x r} for every target."""
        chosen = self.targets(linears, others)
        features = outputs(chosen) + inputs(chosen)
        return self.rank * features


class Started(Protocol):
    """Options that have a rank and say how A and B start."""

    @property
    def rank(self) -> int:
        """The inner dimension of the update."""
        ...

    @property
    def init(self) -> str:
        """The name of the start of A and B."""
        ...


def check_directions(options: Started, chosen: Linears) -> None:
    """Raise ValueError where a start from singular vectors asks for more than a matrix has."""
    rank = options.rank
    init = options.init
    if init not in STARTS_FROM_DIRECTIONS:
        return
    for name, shape in chosen.items():
        available = min(shape)
        if rank > available:
            raise ValueError(f"found rank {rank} for init {init}; {name} has {available} directions")


def is_scaled(config: BaseConfig) -> bool:
    """Whether a base's config.json scales rotary frequencies, or has several kinds of them."""
    rope = config.get("rope_parameters")
    if not rope:
        rope = config.get("rope_scaling") or {}
    for value in rope.values():
        if isinstance(value, Mapping):  # one kind of frequencies among several
            return True
    kind = rope.get("type", "default")  # the key's older name
    kind = rope.get("rope_type", kind)
    return bool(kind != "default")
