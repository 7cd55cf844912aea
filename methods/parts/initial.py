"""Starts of LoRA that come from the base's own weights W in R^{out x in}, with the scale s of the update.

- pissa: W = U S V^T; B0 = U_r (S_r / s)^{1/2}, A0 = (S_r / s)^{1/2} V_r^T (Meng et al. 2024, arXiv 2404.02948,
  equations 2 and 3; divided by s, as PEFT does, so that s B0 A0 is the principal part).
- olora: W = Q R; B0 = Q_r, A0 = R_r (Büyükakyüz 2024, arXiv 2406.01775, section 3).

Both go on from the residual W - s B0 A0. What was learned is s (B A - B0 A0), which for the untouched base is a LoRA
of twice the rank, `[B, -B0] [A; A0]`: that is exported. A checkpoint keeps A0 and B0, since the signs of singular
vectors differ between machines. The residual is rounded to the base's dtype: in bf16, training and export differ by
that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear

from methods.base import Gather, Tensors
from methods.parts.peft_adapter import ADAPTER

Factors = Tensors  # A0 and B0 by the names of A and B
FactorPair = tuple[Tensor, Tensor]  # A [rank, in] and B [out, rank]


def move_base(model: Module, start: str, known: Factors, gather: Gather) -> Factors:
    """Put A0 and B0 in place, take them out of the base, and give them; `known` ones are not sought again."""
    moved: Factors = {}
    for name, layer in adapted(model):
        A = layer.lora_A[ADAPTER].weight
        B = layer.lora_B[ADAPTER].weight
        base = layer.get_base_layer()
        weight = base.weight
        device = weight.device
        scale = layer.scaling[ADAPTER]
        a, b = factor_names(name)
        with torch.no_grad(), gather.gathered([weight], modified=True):
            if known:
                A0 = known[a].to(device)
                B0 = known[b].to(device)
            else:
                rank = len(A)
                A0, B0 = directions(weight, start, rank, scale)
            A.copy_(A0)
            B.copy_(B0)
            scaled_B = scale * B
            principal = scaled_B @ A
            residual = weight.float() - principal
            weight.copy_(residual)
        moved[a] = _factor_on_host(A0)
        moved[b] = _factor_on_host(B0)
    return moved


def _factor_on_host(factor: Tensor) -> Tensor:
    """A factor in the host's memory, row by row."""
    factor = factor.cpu()
    return factor.contiguous()


@contextmanager
def restored(model: Module, start: Factors) -> Iterator[None]:
    """Within it, layers whose adapter is off give s B0 A0 x beside what is left of their base."""
    if not start:
        yield
        return
    handles = []
    for name, layer in adapted(model):
        a, b = factor_names(name)
        base = layer.get_base_layer()
        device = base.weight.device
        A0 = start[a].to(device)
        B0 = start[b].to(device)
        scale = layer.scaling[ADAPTER]
        hook = _adding(A0, B0, scale)
        handle = layer.register_forward_hook(hook)
        handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(A0: Tensor, B0: Tensor, scale: float) -> Callable[..., Tensor]:
    """A hook that adds s B0 A0 x, in the order of PEFT's own forward pass."""

    def add(_: Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add it in the factors' dtype, and give the sum in the output's."""
        x = inputs[0]
        x = x.to(A0.dtype)
        narrow = linear(x, A0)
        update = linear(narrow, B0)
        scaled = update * scale
        total = output + scaled
        return total.to(output.dtype)

    return add


def directions(weight: Tensor, start: str, rank: int, scale: float) -> FactorPair:
    """A0 [rank, in] and B0 [out, rank] of a weight [out, in]."""
    weight = weight.float()
    if start == "olora":
        Q, R = torch.linalg.qr(weight)
        A0 = R[:rank]
        B0 = Q[:, :rank]
        return A0, B0
    return principal_factors(weight, rank, scale)


def principal_factors(matrix: Tensor, rank: int, scale: float) -> FactorPair:
    """A [rank, in] and B [out, rank] for which scale B A is the best approximation of an fp32 matrix [out, in]."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    leading = S[:rank]
    values = leading / scale
    root = values.sqrt()
    column = root[:, None]
    rights = Vh[:rank]
    lefts = U[:, :rank]
    A = column * rights
    B = lefts * root
    return A, B


def differences(weights: Mapping[str, Tensor], start: Factors) -> Factors:
    """`[A; A0]` and `[B, -B0]` for every A and B; what else is trained (embeddings of new tokens) as it is."""
    differences: Factors = {}
    for name, value in weights.items():
        first = start.get(name)
        if first is None:
            joined = value
        elif ".lora_A." in name:
            joined = torch.cat([value, first], 0)
        else:
            negative = -first
            joined = torch.cat([value, negative], 1)
        differences[name] = joined
    return differences


def factor_names(module: str) -> tuple[str, str]:
    """The names of A and B of a module that has a LoRA."""
    a = f"{module}.lora_A.{ADAPTER}.weight"
    b = f"{module}.lora_B.{ADAPTER}.weight"
    return a, b


def adapted(model: Module) -> Iterator[tuple[str, LoraLayer]]:
    """The modules that have a LoRA, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
