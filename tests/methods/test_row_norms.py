"""The norms of rows of W + s B A from its factors are those of the sum."""

import pytest
import torch
from torch import Tensor

from methods.parts.row_norms import row_norms

SHAPES = [(70, 200, 4), (33, 512, 40), (2048, 8192, 16), (64, 96, 1)]  # outputs, inputs and rank of each weight
SCALES = [2.0, 0.5, 1.0, 3.0]


def drawn(dtype: torch.dtype, device: str, shapes: list[tuple[int, int, int]]) -> list[list[Tensor]]:
    """Weights, both factors in fp32, and the squares of the weights' own norms."""
    torch.manual_seed(0)
    weights, a, b = [], [], []
    for outputs, inputs, rank in shapes:
        weights.append(torch.randn(outputs, inputs, device=device).to(dtype))
        a.append(0.1 * torch.randn(rank, inputs, device=device))
        b.append(0.1 * torch.randn(outputs, rank, device=device))
    squares = [weight.float().square().sum(1) for weight in weights]
    return [weights, a, b, squares]


def assert_norms(dtype: torch.dtype, device: str, shapes: list[tuple[int, int, int]]) -> None:
    weights, a, b, squares = drawn(dtype, device, shapes)
    scales = SCALES[: len(shapes)]
    norms = row_norms(weights, a, b, squares, scales)
    start = 0
    for weight, a_RI, b_OR, scale in zip(weights, a, b, scales, strict=True):
        update = b_OR.to(dtype).double() @ a_RI.to(dtype).double()
        whole = weight.double() + scale * update
        found = norms[start : start + len(weight)]
        torch.testing.assert_close(found.double(), whole.norm(dim=1), rtol=1e-4 if device == "cuda" else 4e-3, atol=0)
        start += len(weight)
    assert start == len(norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_sums(dtype: torch.dtype) -> None:
    assert_norms(dtype, "cpu", SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [SHAPES, [(64, 96, 80), (2048, 512, 8)], [(512, 512, 16)]])
def test_norms_of_a_gpu_are_those_of_the_sums(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> None:
    assert_norms(dtype, "cuda", shapes)
