"""Full fine-tuning whose optimizer lives in a subspace."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from methods.options.base import NO_SECOND_MODEL, Count, Footprint, Positive, Targeted, element_count
from methods.parts.targets import Linears, Matrices, Others, Target


class Galore(Targeted):
    """Full fine-tuning whose optimizer lives in a low-rank subspace of each matrix's gradient.

    A matrix with no more rows or columns than the rank has plain AdamW: a subspace would leave nothing out, and its
    basis would take more memory than it saves.
    """

    kind: Literal["galore"] = "galore"
    implementation: ClassVar[str] = "methods.galore:GaloreTuning"
    refusals: ClassVar[Mapping[str, str]] = {
        **NO_SECOND_MODEL,
        "offload": "its moments are small ones in subspaces, which stay on the device; nearest: full",
    }
    default_lr: ClassVar[float] = 1e-3
    makes_model: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where all weights are to learn and AdamW's two moments of them do not fit: the paper saves two "
        "thirds of that state at a rank of a quarter of the width. What speaks for it is pretraining, and little "
        "is known of fine-tuning. To save memory against LoRA it is the wrong choice, as weights and gradients "
        "are there in full, and it leaves a model, not an adapter."
    )

    target: Target = Field(
        "all-linear", description="names of the modules whose optimizer lives in a subspace, or all-linear"
    )
    exclude: tuple[str, ...] = Field((), description="names of modules that have plain AdamW, as all others do")
    variant: Literal["galore", "q-galore", "apollo"] = Field(
        "galore", description="q-galore: 4-bit projector, lazy refresh; apollo: random projection, scaled gradient"
    )
    rank: Count = Field(128, description="rank r of the subspace; a matrix of no more rows or columns has AdamW")
    refresh_every: Count = Field(
        200, description="steps between two refreshes of the subspace, of which each takes a decomposition"
    )
    refresh: Literal["exact", "fast"] = Field(
        "exact", description="how singular vectors are found: exactly, or by random sketching"
    )
    scale: Positive = Field(0.25, description="factor of the learning rate for what moves in a subspace")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="precision of the moments in the subspace: fp32, or 8 bits"
    )

    @model_validator(mode="after")
    def _check_refresh(self) -> "Galore":
        if self.variant == "apollo" and self.refresh == "fast":
            raise ValueError("found refresh fast with variant apollo, whose bases are random; allowed: exact")
        return self

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """None: GaLore adds no parameters to the base."""
        return 0

    def trained_parameters(self, linears: Linears, others: Others) -> int:
        """The number of weights of the base, which are all trained; raises ValueError for a bad target."""
        self.targets(linears, others)  # raises ValueError for a bad target
        return element_count(linears) + element_count(others)

    def projected(self, linears: Linears, others: Others) -> Matrices:
        """The targets that are larger than the rank both ways, which have a subspace, with their (out, in)."""
        larger: Matrices = {}
        targets = self.targets(linears, others)
        for name, shape in targets.items():
            shorter_side = min(shape)
            if shorter_side > self.rank:
                larger[name] = shape
        return larger

    def optimizer_bytes(self, linears: Linears, others: Others) -> Footprint:
        """Moments in subspaces and of the weights that have none; and all bases, which every worker has."""
        projected = self.projected(linears, others)
        shapes = projected.values()
        longer = sum(map(max, shapes))
        shorter = sum(map(min, shapes))
        moments = 2 * self.rank * longer
        low_rank_moments = moments * self._bytes_per_moment()
        trained = self.trained_parameters(linears, others)
        plain = trained - element_count(projected)
        plain_moments = 8 * plain
        entries = self.rank * shorter
        bases = entries * self._bytes_per_basis_entry()
        directions = 0
        if self.is_lazy:
            directions = 4 * shorter  # the leading direction of each matrix, in fp32
        shared = round(low_rank_moments) + plain_moments
        replicated = round(bases) + directions
        return shared, replicated

    @property
    def is_lazy(self) -> bool:
        """Whether bases are in 4 bits, and refreshed less often while the leading direction stays."""
        return self.variant == "q-galore"

    # In blocks of 256 numbers: 8-bit moments have an fp32 scale, 4-bit bases a scale and a zero point.

    def _bytes_per_moment(self) -> float:
        """Bytes of one number of a moment in a subspace."""
        if self.optimizer == "adamw8bit":
            return 1 + 4 / 256
        return 4

    def _bytes_per_basis_entry(self) -> float:
        """Bytes of one number of a basis."""
        if self.is_lazy:
            return 1 / 2 + 8 / 256
        return 4
