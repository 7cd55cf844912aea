"""Full fine-tuning: the weights of the base themselves are trained."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import ClassVar, Literal

from pydantic import Field

from methods.options.base import NO_SECOND_MODEL, WEIGHTS_EXPONENT, Count, Options
from methods.parts.targets import Dimensions, Linears, Others, is_any_named, is_named


class Full(Options):
    """Train every weight of the base, or those that are not frozen."""

    kind: Literal["full"] = "full"
    implementation: ClassVar[str] = "methods.full:FullTuning"
    refusals: ClassVar[Mapping[str, str]] = NO_SECOND_MODEL
    default_lr: ClassVar[float] = 2e-5
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    makes_model: ClassVar[bool] = True
    trains_new_tokens: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where there is much new text to learn, as in continued pretraining, code or a new language: "
        "there LoRA stays behind (Biderman et al. 2024, arXiv 2405.09673), and where there are 16 bytes of memory "
        "for each weight. On some ten thousand rows of instructions it is seldom better than LoRA, it forgets "
        "more of what the base knew, and every task leaves a model of its own instead of a small adapter."
    )

    freeze: tuple[str, ...] = Field((), description="patterns of weights that stay as they are, like *embed_tokens*")
    lisa_layers: int | None = Field(
        None, ge=1, description="layers trained at a time, drawn at random; null: all layers"
    )
    lisa_every: Count = Field(
        20, description="steps between two draws of layers; without lisa_layers it has no effect"
    )

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """None: full fine-tuning adds no parameters to the base."""
        return 0

    def trained_parameters(self, linears: Linears, others: Others) -> int:
        """The number of weights that `freeze` does not name; raises ValueError where that is none."""
        shapes: dict[str, Dimensions] = dict(others)
        for module, matrix_shape in linears.items():
            shapes[f"{module}.weight"] = matrix_shape
        self._check_patterns(shapes)
        self._check_layers(shapes)
        trained = 0
        for name, shape in shapes.items():
            if not self.freezes(name):
                trained += prod(shape)
        if trained == 0:
            raise ValueError("found patterns in freeze that match every weight; allowed: to leave one to train")
        return trained

    def freezes(self, name: str) -> bool:
        """Whether the weight of this name stays as it is."""
        return is_any_named(name, self.freeze)

    def _check_patterns(self, names: Iterable[str]) -> None:
        """Raise ValueError where a pattern in `freeze` matches none of these names."""
        for pattern in self.freeze:
            matches = (is_named(name, pattern) for name in names)
            if not any(matches):
                raise ValueError(f"found the pattern {pattern!r} in freeze, which no weight of the base matches")

    def _check_layers(self, names: Iterable[str]) -> None:
        """Raise ValueError where `lisa_layers` is more than the layers of a base with these names."""
        wanted = self.lisa_layers
        if wanted is None:
            return
        layers = set(map(layer_of, names))
        layers.discard(None)
        count = len(layers)
        if wanted > count:
            raise ValueError(f"found lisa_layers {wanted}; allowed: up to the base's {count} layers")


def layer_of(name: str) -> int | None:
    """The transformer layer that a weight is in, by the first number in its name; None outside of all layers."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None
