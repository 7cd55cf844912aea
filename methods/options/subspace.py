"""Full fine-tuning whose optimizer lives in a subspace."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from methods.options.base import NO_SECOND_MODEL, Targeted, size
from methods.parts.targets import Linears, Others


class Galore(Targeted):
    """Full fine-tuning whose optimizer lives in a low-rank subspace of each matrix's gradient.

    A matrix with no more rows or columns than the rank has plain AdamW: a subspace would leave nothing out, and its
    basis would take more memory than it saves.
    """

    kind: Literal["galore"] = "galore"
    implementation: ClassVar[str] = "methods.galore:GaloreTuning"
    refusals: ClassVar[Mapping[str, str]] = NO_SECOND_MODEL
    default_lr: ClassVar[float] = 1e-3
    makes_model: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True

    variant: Literal["galore", "q-galore", "apollo"] = Field(
        "galore", description="q-galore: 4-bit projector, lazy refresh; apollo: random projection, scaled gradient"
    )
    rank: int = Field(128, ge=1, description="rank r of the subspace; a matrix of no more rows or columns has AdamW")
    refresh_every: int = Field(200, ge=1, description="steps between two refreshes of the subspace")
    refresh: Literal["exact", "fast"] = Field("exact", description="singular vectors, exact or by random sketching")
    scale: float = Field(0.25, gt=0, description="factor of the projected update")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="what moves in the subspace")

    @model_validator(mode="after")
    def _singular(self) -> "Galore":
        if self.variant == "apollo" and self.refresh == "fast":
            raise ValueError("found refresh fast with variant apollo, whose bases are random; allowed: exact")
        return self

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def trained(self, linears: Linears, others: Others) -> int:
        """Every weight."""
        self.targets(linears, others)
        return size(linears) + size(others)

    def projected(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
        """The targets that are larger than the rank both ways, which have a subspace, with their (out, in)."""
        chosen = self.targets(linears, others)
        return {name: shape for name, shape in chosen.items() if min(shape) > self.rank}

    def optimizer_bytes(self, linears: Linears, others: Others) -> tuple[int, int]:
        """Moments in subspaces and of the weights that have none; and all bases, which every worker has."""
        chosen = self.projected(linears, others)
        moments = 2 * self.rank * sum(max(shape) for shape in chosen.values())
        bases = self.rank * sum(min(shape) for shape in chosen.values())
        # In blocks of 256 numbers: 8-bit moments have an fp32 scale, 4-bit bases a scale and a zero point.
        moment = 1 + 4 / 256 if self.optimizer == "adamw8bit" else 4
        lazy = self.variant == "q-galore"  # keeps a direction of each matrix too
        basis = 1 / 2 + 8 / 256 if lazy else 4
        directions = sum(4 * min(shape) for shape in chosen.values()) if lazy else 0
        rest = self.trained(linears, others) - size(chosen)
        return round(moments * moment) + 8 * rest, round(bases * basis) + directions
