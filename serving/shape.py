"""What a decoder of the Llama family looks like, from its transformers config."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from serving.error import BaseRefused

FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length
GATE_ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}


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

    @property
    def query_size(self) -> int:
        """Numbers of all queries of a row."""
        return self.heads * self.head_size

    @property
    def key_size(self) -> int:
        """Numbers of all keys of a row, or of all values."""
        return self.kv_heads * self.head_size

    @property
    def all_heads(self) -> int:
        """Heads of queries, keys and values together."""
        of_keys_and_values = 2 * self.kv_heads
        return self.heads + of_keys_and_values

    @property
    def queries_of_key(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a config; raises BaseRefused where the engine has no such forward pass."""
        check(config)
        width = config.hidden_size
        heads = config.num_attention_heads
        norm_offset, embed_scale = 0.0, 1.0
        if config.model_type == "gemma":
            norm_offset, embed_scale = 1.0, width**0.5
        return cls(
            layers=config.num_hidden_layers,
            width=width,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_size=getattr(config, "head_dim", None) or width // heads,
            mlp=config.intermediate_size,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
            epsilon=config.rms_norm_eps,
            norm_offset=norm_offset,
            embed_scale=embed_scale,
            gelu=GATE_ACTIVATIONS[activation(config)],
            window=attention_window(config),
        )


def check(config: Any) -> None:
    """Raise BaseRefused where a config asks for what the forward pass does not have."""
    _check_value("model type", config.model_type, FAMILIES)
    _check_value("rotary positions of type", rope_type(config), ROPES)
    _check_value("activation", activation(config), GATE_ACTIVATIONS)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    kinds = sorted(set(layer_types))
    if len(kinds) > 1:
        raise BaseRefused(f"base: found layers of {' and '.join(kinds)}; allowed: one kind in all layers")


def _check_value(title: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        known = ", ".join(allowed)
        raise BaseRefused(f"base: found {title} {value!r}; allowed: {known}")


def rope_type(config: Any) -> str:
    """The kind of a config's rotary positions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def activation(config: Any) -> str:
    """The name of a config's activation; Gemma's first configs say gelu and mean its tanh approximation."""
    name = str(config.hidden_act)
    if config.model_type == "gemma" and name == "gelu":
        return "gelu_pytorch_tanh"
    return name


def attention_window(config: Any) -> int | None:
    """How many tokens attention sees back."""
    if not getattr(config, "use_sliding_window", True):
        return None
    size: int | None = getattr(config, "sliding_window", None)
    return size
