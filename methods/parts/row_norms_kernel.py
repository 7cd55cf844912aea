"""The kernel of `row_norms.py`, on a GPU: one launch reads each weight once. Shapes: O outputs, I inputs, R rank."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

NORM_TILING = {"OUTPUTS": 16, "STAGES": 3, "num_warps": 4}
NUMBERS_OF_A = 2048  # that are read at once
ROW_ALIGNMENT = 16  # elements that are read at once, where they begin at a multiple of it
TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class WeightPlace(NamedTuple):
    """What the kernel knows of a weight: where it, its factors, squares and norms lie, and their sizes."""

    weight: int
    a: int
    b: int
    square: int
    start: int  # of its norms among all
    outputs: int
    inputs: int
    stride: int  # from row to row of the weight
    rank: int


@triton.jit
def with_factor(
    weight, a, output, outputs, inputs, stride, rank,
    RANK: constexpr, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr,
):  # fmt: skip
    """W A^T of a few rows of a weight and A A^T, both fp32, summed up along I; A is taken in the weight's dtype."""
    number = tl.arange(0, RANK)
    row = weight + output.to(tl.int64)[:, None] * stride
    along = tl.zeros([OUTPUTS, RANK], dtype=tl.float32)
    gram = tl.zeros([RANK, RANK], dtype=tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        column = first + tl.arange(0, INPUTS)
        in_inputs = (column < inputs)[None, :]
        rows = tl.load(row + column[None, :], mask=(output < outputs)[:, None] & in_inputs, other=0.0)
        in_factor = (number < rank)[:, None] & in_inputs
        factor = tl.load(a + number[:, None] * inputs + column[None, :], mask=in_factor, other=0.0)
        factor = factor.to(rows.dtype)
        turned = tl.trans(factor)
        along += tl.dot(rows, turned, input_precision="ieee")
        gram += tl.dot(factor, turned, input_precision="ieee")
    return along, gram


@triton.jit
def norms_kernel(
    places, scales, norms,
    FIELDS: constexpr, WEIGHT: constexpr, FACTOR: constexpr, ALIGNED: constexpr,
    RANK: constexpr, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr,
):  # fmt: skip
    """The norms of a few rows of one weight."""
    of_weight = places + tl.program_id(1) * FIELDS
    outputs = tl.load(of_weight + 5).to(tl.int32)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if tl.program_id(0) * OUTPUTS >= outputs:
        return
    weight = tl.load(of_weight).to(tl.pointer_type(WEIGHT))
    a = tl.load(of_weight + 1).to(tl.pointer_type(FACTOR))
    b = tl.load(of_weight + 2).to(tl.pointer_type(FACTOR))
    square = tl.load(of_weight + 3).to(tl.pointer_type(tl.float32))
    inputs = tl.load(of_weight + 6).to(tl.int32)
    stride = tl.load(of_weight + 7)
    rank = tl.load(of_weight + 8).to(tl.int32)
    scale = tl.load(scales + tl.program_id(1))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        a = tl.multiple_of(a, 16)
        inputs = tl.multiple_of(inputs, 16)
        stride = tl.multiple_of(stride, 16)
    along, gram = with_factor(weight, a, output, outputs, inputs, stride, rank, RANK, OUTPUTS, INPUTS, STAGES)
    number = tl.arange(0, RANK)
    in_outputs = output < outputs
    in_b = in_outputs[:, None] & (number < rank)[None, :]
    wide = tl.load(b + output[:, None] * rank + number[None, :], mask=in_b, other=0.0).to(WEIGHT).to(tl.float32)
    both = tl.dot(wide, gram, input_precision="ieee")
    added = tl.sum(wide * (2.0 * scale * along + scale * scale * both), 1)
    own = tl.load(square + output, mask=in_outputs, other=0.0)
    norm = tl.sqrt(tl.maximum(own + added, 0.0))
    tl.store(norms + tl.load(of_weight + 4) + output, norm, mask=in_outputs)


def fill_norms(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    squares: Sequence[Tensor],
    scales: Sequence[float],
    norms: Sequence[Tensor],
) -> None:
    """Write the norms of each weight's rows into its part of one tensor; `row_norms` says of what."""
    start = 0
    places = []
    for weight, a_RI, b_OR, square in zip(weights, a, b, squares, strict=True):
        outputs, inputs = weight.shape
        pointers = (weight.data_ptr(), a_RI.data_ptr(), b_OR.data_ptr(), square.data_ptr())
        place = WeightPlace(*pointers, start, outputs, inputs, weight.stride(0), len(a_RI))
        places.append(place)
        start += outputs
    ranks = [place.rank for place in places]
    largest_rank = max(16, triton.next_power_of_2(max(ranks)))
    most_outputs = max(place.outputs for place in places)
    grid = (triton.cdiv(most_outputs, NORM_TILING["OUTPUTS"]), len(places))
    table, scales_on_device = _on_device(tuple(places), tuple(scales), norms[0].device)
    norms_kernel[grid](
        table,
        scales_on_device,
        norms[0],
        FIELDS=len(WeightPlace._fields),
        WEIGHT=TRITON_TYPES[weights[0].dtype],
        FACTOR=TRITON_TYPES[a[0].dtype],
        ALIGNED=all(map(_is_aligned, places)),
        RANK=largest_rank,
        INPUTS=NUMBERS_OF_A // largest_rank,
        **NORM_TILING,
    )


@lru_cache(maxsize=2)
def _on_device(places: Sequence[WeightPlace], scales: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernel knows of all weights, and their scales; kept, as a copy to the device waits."""
    places_on_device = torch.tensor(places, device=device)
    scales_on_device = torch.tensor(scales, dtype=torch.float32, device=device)
    return places_on_device, scales_on_device


def _is_aligned(place: WeightPlace) -> bool:
    """Whether sixteen elements of a row can be read at once, wherever they begin."""
    addresses = (place.weight, place.a)
    lengths = (place.inputs, place.stride)
    common = gcd(ROW_ALIGNMENT, *addresses, *lengths)
    return common == ROW_ALIGNMENT
