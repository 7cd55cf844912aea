"""A base's attention, where a method stands in for it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace(model: "PreTrainedModel", attention: str, kind: str, nearest: str) -> None:
    """Have a base use an attention that is registered; raises ValueError where it calls one of its own instead."""
    if not model._supports_attention_backend:
        base = f"a base of type {model.config.model_type}"
        raise ValueError(f"method.kind: {kind} cannot change the attention of {base}; nearest: {nearest}")
    model.set_attn_implementation(attention)
