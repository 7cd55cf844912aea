"""A base's attention, where a method stands in for it, and where ranks share rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_POSITIONS = "whole_position_ids"  # argument of a base: the positions [B, T] of rows of which it gets a part


@dataclass(frozen=True)
class PartOfHeads:
    """Which of `count` equal parts of all heads an attention has; it has whole rows, which as many ranks share."""

    index: int
    count: int

    def places(self, heads: int) -> slice:
        """Where its heads are among all heads, of which it has so many."""
        first = self.index * heads
        return slice(first, first + heads)


ALL_HEADS = PartOfHeads(0, 1)


def replace(model: "PreTrainedModel", attention: str, kind: str, nearest: str) -> None:
    """Have a base use an attention that is registered; raises ValueError where it calls one of its own instead."""
    if not model._supports_attention_backend:
        base = f"a base of type {model.config.model_type}"
        raise ValueError(f"method.kind: {kind} cannot change the attention of {base}; nearest: {nearest}")
    model.set_attn_implementation(attention)
