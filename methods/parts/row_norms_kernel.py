"""The kernel of `row_norms.py`, on a GPU: it reads W once. Shapes: O outputs, I inputs, R rank."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

NORM_TILING = {"OUTPUTS": 16, "INPUTS": 256, "STAGES": 3, "num_warps": 4}


@triton.jit
def added_squares_kernel(
    weight,
    a,
    b,
    added,
    outputs,
    inputs,
    stride,
    rank,
    scale,
    RANK: constexpr,
    OUTPUTS: constexpr,
    INPUTS: constexpr,
    STAGES: constexpr,
):
    """What the update adds to the squared norms of a few rows of W: W A^T and A A^T are summed up along I."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_outputs = output < outputs
    number = tl.arange(0, RANK)
    in_rank = number < rank
    weight += output.to(tl.int64)[:, None] * stride
    along = tl.zeros([OUTPUTS, RANK], dtype=tl.float32)
    gram = tl.zeros([RANK, RANK], dtype=tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        place = first + tl.arange(0, INPUTS)
        in_inputs = (place < inputs)[None, :]
        rows = tl.load(weight + place[None, :], mask=in_outputs[:, None] & in_inputs, other=0.0)
        factor = tl.load(a + number[:, None] * inputs + place[None, :], mask=in_rank[:, None] & in_inputs, other=0.0)
        turned = tl.trans(factor)
        along += tl.dot(rows, turned, input_precision="ieee")
        gram += tl.dot(factor, turned, input_precision="ieee")
    in_factor = in_outputs[:, None] & in_rank[None, :]
    wide = tl.load(b + output[:, None] * rank + number[None, :], mask=in_factor, other=0.0).to(tl.float32)
    both = tl.dot(wide, gram, input_precision="ieee")
    total = tl.sum(wide * (2.0 * scale * along + scale * scale * both), 1)
    tl.store(added + output, total, mask=in_outputs)


def added_squares(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o for each output o, fp32."""
    outputs, inputs = weight_OI.shape
    rank = len(a_RI)
    if weight_OI.stride(1) != 1:
        weight_OI = weight_OI.contiguous()
    added_O = torch.empty(outputs, dtype=torch.float32, device=weight_OI.device)
    rows_at_once = triton.cdiv(outputs, NORM_TILING["OUTPUTS"])
    added_squares_kernel[(rows_at_once,)](
        weight_OI,
        a_RI.contiguous(),
        b_OR.contiguous(),
        added_O,
        outputs,
        inputs,
        weight_OI.stride(0),
        rank,
        scale,
        RANK=max(16, triton.next_power_of_2(rank)),
        **NORM_TILING,
    )
    return added_O
