"""How much arithmetic a step is, and how much the device could do."""

import resource
import time
from typing import Any

import torch
from torch import nn

from methods.parts import quantised
from trainer.devices import peak_of_name
from trainer.zero.gather import shape


def flops_per_token(model: Any) -> float:
    """Model FLOPs of one trained token, attention scores left out: 2 per weight forward, 2 for the gradient of the
    activations, 2 for that of each trained weight (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    embedding = model.get_input_embeddings().weight
    tied = getattr(model.config, "tie_word_embeddings", False)
    lookup = 0 if tied else numel(embedding)  # weights that are looked up, not multiplied
    weights = count_weights(model) - lookup
    trained = count_trained(model)
    if embedding.requires_grad:
        trained -= lookup
    trained = max(0, trained)
    return 4.0 * weights + 2.0 * trained


def count_weights(model: nn.Module) -> int:
    """Weights of a model; a 4-bit layer keeps its own in a buffer, two to a byte."""
    sizes = map(numel, model.parameters())
    weights = sum(sizes)
    for _, layer in quantised.four_bit_layers(model):
        packed = layer.in_features * layer.out_features
        weights += int(packed)
    return weights


def count_trained(model: nn.Module) -> int:
    """Weights of a model that are trained, sharded or not."""
    trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += numel(parameter)
    return trained


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a device: the vendor's dense bf16 figure where known, else that of a matrix product measured now."""
    on_gpu = device.type == "cuda"
    if on_gpu and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        peak = peak_of_name(name)
        if peak is not None:
            return peak
    return _measured(device, dtype)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * 1024


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of four products of two square matrices."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds = time.perf_counter() - began
        best = min(best, seconds)
    flops = 2 * size**3
    return flops / best


def numel(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, sharded or not."""
    whole = shape(parameter)
    return int(whole.numel())
