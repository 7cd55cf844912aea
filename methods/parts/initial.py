"""Starts of LoRA that come from the base's own weights W in R^{out x in}, with the scale s of the update.

- pissa: W = U S V^T; B0 = U_r (S_r / s)^{1/2}, A0 = (S_r / s)^{1/2} V_r^T (Meng et al. 2024, arXiv 2404.02948,
  equations 2 and 3; divided by s, as PEFT does, so that s B0 A0 is the principal part).
- olora: W = Q R; B0 = Q_r, A0 = R_r (Büyükakyüz 2024, arXiv 2406.01775, section 3).

Both go on from the residual W - s B0 A0. What was learned is s (B A - B0 A0), which for the untouched base is a LoRA
of twice the rank, [B, -B0] [A; A0]: that is exported. A checkpoint keeps A0 and B0, since the signs of singular
vectors differ between machines. The residual is rounded to the base's dtype: in bf16, training and export differ by
that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

from methods.base import Gather
from methods.parts.peft_adapter import ADAPTER

Factors = dict[str, torch.Tensor]  # A0 and B0 by the names of A and B


def move_base(model: nn.Module, start: str, known: Factors, gather: Gather) -> Factors:
    """Put A0 and B0 in place, take them out of the base, and give them; `known` ones are not sought again."""
    moved: Factors = {}
    for name, layer in adapted(model):
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        weight, scale = layer.get_base_layer().weight, layer.scaling[ADAPTER]
        names = f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight"
        with torch.no_grad(), gather.gathered([weight], modified=True):
            found = [known[n].to(weight.device) for n in names] if known else directions(weight, start, len(A), scale)
            for target, value in zip((A, B), found, strict=True):
                target.copy_(value)
            weight.copy_(weight.float() - scale * B @ A)
        moved |= {n: value.cpu().contiguous() for n, value in zip(names, found, strict=True)}
    return moved


@contextmanager
def restored(model: nn.Module, start: Factors) -> Iterator[None]:
    """Within it, layers whose adapter is off give s B0 A0 x beside what is left of their base."""
    handles = []
    for name, layer in adapted(model) if start else ():
        names = f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight"
        device = layer.get_base_layer().weight.device
        A0, B0 = (start[factor].to(device) for factor in names)
        handles.append(layer.register_forward_hook(_adding(A0, B0, layer.scaling[ADAPTER])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(A0: torch.Tensor, B0: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
    """A hook that adds s B0 A0 x, in the order of PEFT's own forward pass."""

    def add(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        given = linear(linear(inputs[0].to(A0.dtype), A0), B0)
        return (output + given * scale).to(output.dtype)

    return add


def directions(weight: torch.Tensor, start: str, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 [rank, in] and B0 [out, rank] of a weight [out, in]."""
    if start == "olora":
        Q, R = torch.linalg.qr(weight.float())
        return R[:rank], Q[:, :rank]
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def differences(weights: Mapping[str, torch.Tensor], start: Factors) -> Factors:
    """[A; A0] and [B, -B0] for every A and B; what else is trained (embeddings of new tokens) as it is."""

    def difference(name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in start:
            return value
        if ".lora_A." in name:
            return torch.cat([value, start[name]], 0)
        return torch.cat([value, -start[name]], 1)

    return {name: difference(name, value) for name, value in weights.items()}


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The modules that have a LoRA, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
