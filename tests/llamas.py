"""Llamas: random ones of two layers, and the shapes of published ones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}

LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

TWO_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def random_llama(**config: Any) -> "LlamaForCausalLM":
    """Two layers, fp32, the same weights at every call, large enough that attention matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TWO_LAYERS | {"vocab_size": 320, "initializer_range": 0.2} | config))


def move_from_start(model: "nn.Module") -> None:
    """Draw what an adapter trains, and biases, anew; magnitudes stay near what they were."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_magnitude" in name:
            weight.data *= torch.rand_like(weight) + 0.5
        elif weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight)


def loss_and_gradients(model: "nn.Module", ids: "Tensor") -> "dict[str, Tensor]":
    """The loss and the gradients of a pass over ids [B, T], with the same dropout each time."""
    import torch

    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
    return found
