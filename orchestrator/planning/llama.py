"""The parameters of a model of the Llama family, as its config.json alone gives them.

Names of dimensions: V vocabulary, H hidden size, F feed-forward size, Q and K sizes of the query and key projections.
"""

from collections.abc import Iterator
from typing import Any

from orchestrator.planning.safetensors import TensorShape

Config = dict[str, Any]  # what config.json holds
Parameters = Iterator[tuple[str, TensorShape]]  # names and shapes

# Values of model_type whose shapes follow from their config.
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}
MOST_LAYERS = 10_000


def llama_shapes(config: Config) -> dict[str, TensorShape]:
    """Parameter name -> shape; raises KeyError, TypeError or ZeroDivisionError for a wrong config."""
    found = dict(_parameters(config))
    for name, shape in found.items():
        for size in shape:
            if not isinstance(size, int) or size < 1:
                raise TypeError(f"{name} would have the shape {shape}")
    return found


def _parameters(config: Config) -> Parameters:
    """Name and shape of every parameter."""
    V = config["vocab_size"]
    H = config["hidden_size"]
    yield "model.embed_tokens.weight", (V, H)
    layers = config["num_hidden_layers"]
    if layers > MOST_LAYERS:
        raise TypeError(f"num_hidden_layers is {layers:,}; allowed: at most {MOST_LAYERS:,}")
    for layer in range(layers):
        for name, shape in _layer_parameters(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (H,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (V, H)


def _layer_parameters(config: Config) -> Parameters:
    """Name and shape of every parameter of one layer."""
    for name, shape, has_bias in _layer_linears(config):
        yield f"{name}.weight", shape
        if has_bias:
            yield f"{name}.bias", shape[:1]
    if config["model_type"] == "qwen3":
        head_dim = _head_dim(config)
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    H = config["hidden_size"]
    yield "input_layernorm.weight", (H,)
    yield "post_attention_layernorm.weight", (H,)


def _layer_linears(config: Config) -> list[tuple[str, TensorShape, bool]]:
    """Name, shape [out, in] and whether there is a bias, of every linear layer of one layer."""
    H = config["hidden_size"]
    F = config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    key_value_heads = config.get("num_key_value_heads") or heads
    Q = heads * head_dim
    K = key_value_heads * head_dim
    kind = config["model_type"]
    attention_bias = bool(config.get("attention_bias"))
    bias_o = attention_bias and kind in ("llama", "qwen3")
    bias_qkv = bias_o or kind == "qwen2"
    mlp_bias = bool(config.get("mlp_bias"))
    bias_mlp = mlp_bias and kind == "llama"
    return [
        ("self_attn.q_proj", (Q, H), bias_qkv),
        ("self_attn.k_proj", (K, H), bias_qkv),
        ("self_attn.v_proj", (K, H), bias_qkv),
        ("self_attn.o_proj", (H, Q), bias_o),
        ("mlp.gate_proj", (F, H), bias_mlp),
        ("mlp.up_proj", (F, H), bias_mlp),
        ("mlp.down_proj", (H, F), bias_mlp),
    ]


def _head_dim(config: Config) -> Any:
    head_dim = config.get("head_dim")
    if head_dim:
        return head_dim
    return config["hidden_size"] // config["num_attention_heads"]
