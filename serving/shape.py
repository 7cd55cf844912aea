"""What a decoder of the Llama family looks like, from its transformers config."""

from dataclasses import dataclass
from typing import Any

from serving.error import BaseRefused

FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and the few choices in which its family differs."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    positions: int
    epsilon: float  # of the norms
    norm_offset: float  # what a norm adds to its weight: 1 in Gemma
    embed_scale: float
    gelu: bool  # tanh-approximated GELU in the place of SiLU
    window: int | None  # tokens that attention sees back, itself included; None: all

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a config; raises BaseRefused where the engine has no such forward pass."""
        check(config)
        gemma = config.model_type == "gemma"
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
            epsilon=config.rms_norm_eps,
            norm_offset=1.0 if gemma else 0.0,
            embed_scale=config.hidden_size**0.5 if gemma else 1.0,
            gelu=ACTIVATIONS[activation(config)],
            window=window(config),
        )


def check(config: Any) -> None:
    """Raise BaseRefused where a config asks for what the forward pass does not have."""
    if config.model_type not in FAMILIES:
        raise BaseRefused(f"base: found model type {config.model_type!r}; allowed: {', '.join(FAMILIES)}")
    rope = rope_type(config)
    if rope not in ROPES:
        raise BaseRefused(f"base: found rotary positions of type {rope!r}; allowed: {', '.join(ROPES)}")
    if activation(config) not in ACTIVATIONS:
        raise BaseRefused(f"base: found activation {activation(config)!r}; allowed: {', '.join(ACTIVATIONS)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        raise BaseRefused(f"base: found layers of {' and '.join(sorted(kinds))}; allowed: one kind in all layers")


def rope_type(config: Any) -> str:
    """The kind of a config's rotary positions."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def activation(config: Any) -> str:
    """The name of a config's activation; Gemma's first configs say gelu and mean its tanh approximation."""
    name = str(config.hidden_act)
    return "gelu_pytorch_tanh" if config.model_type == "gemma" and name == "gelu" else name


def window(config: Any) -> int | None:
    """How many tokens attention sees back."""
    if not getattr(config, "use_sliding_window", True):
        return None
    found: int | None = getattr(config, "sliding_window", None)
    return found
