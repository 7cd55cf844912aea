"""The kernels of `gate.py`, on a GPU: a program goes down a column of tiles, and reads the next while it computes one.

Shapes: N tokens, F outputs of gate and up, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

# Of 14 forms that were tried on an H200 (8,192 tokens and outputs, rank 16) the fastest.
TOKENS, OUTPUTS, TILES, STAGES, WARPS = 32, 128, 8, 3, 4


@triton.jit
def wide_tile(wide, output, outputs, rank, RANK: constexpr):
    """A tile [R, F] of a weight [F, R]."""
    number = tl.arange(0, RANK)
    inside = (number[:, None] < rank) & (output[None, :] < outputs)
    return tl.load(wide + output[None, :] * rank + number[:, None], mask=inside, other=0.0)


@triton.jit
def narrow_tile(narrow, token, inside, stride, rank, RANK: constexpr):
    """A tile [N, R] of narrow products."""
    number = tl.arange(0, RANK)
    in_tile = inside[:, None] & (number[None, :] < rank)
    return tl.load(narrow + token[:, None] * stride + number[None, :], mask=in_tile, other=0.0)


@triton.jit
def forward_kernel(
    gate,
    up,
    narrow_gate,
    narrow_up,
    wide_gate,
    wide_up,
    share_gate,
    share_up,
    hidden,
    tokens,
    outputs,
    stride_gate,
    stride_up,
    rank_gate,
    rank_up,
    SHARES: constexpr,
    RANK: constexpr,
    TOKENS: constexpr,
    OUTPUTS: constexpr,
    TILES: constexpr,
    STAGES: constexpr,
):
    """A column of tiles of silu(gate) * up."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_outputs = output < outputs
    first = tl.program_id(1).to(tl.int64) * (TOKENS * TILES)
    left = (tokens - first).to(tl.int32)
    gate += first * outputs
    up += first * outputs
    hidden += first * outputs
    narrow_gate += first * stride_gate
    narrow_up += first * stride_up
    of_gate = wide_tile(wide_gate, output, outputs, rank_gate, RANK)
    of_up = wide_tile(wide_up, output, outputs, rank_up, RANK)
    if SHARES:
        gate_share = tl.load(share_gate + output, mask=in_outputs, other=0.0)
        up_share = tl.load(share_up + output, mask=in_outputs, other=0.0)
    for tile in tl.range(TILES, num_stages=STAGES):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        inside = token < left
        in_tile = inside[:, None] & in_outputs[None, :]
        place = token[:, None] * outputs + output[None, :]
        gate_sum = tl.load(gate + place, mask=in_tile, other=0.0).to(tl.float32)
        up_sum = tl.load(up + place, mask=in_tile, other=0.0).to(tl.float32)
        gate_narrow = narrow_tile(narrow_gate, token, inside, stride_gate, rank_gate, RANK)
        up_narrow = narrow_tile(narrow_up, token, inside, stride_up, rank_up, RANK)
        gate_sum += tl.dot(gate_narrow, of_gate, input_precision="ieee")
        up_sum += tl.dot(up_narrow, of_up, input_precision="ieee")
        if SHARES:
            gate_sum *= gate_share[None, :]
            up_sum *= up_share[None, :]
        activation = gate_sum * tl.sigmoid(gate_sum) * up_sum
        tl.store(hidden + place, activation.to(hidden.dtype.element_ty), mask=in_tile)


@triton.jit
def backward_kernel(
    slope,
    slope_following,
    gate,
    up,
    narrow_gate,
    narrow_up,
    wide_gate,
    wide_up,
    share_gate,
    share_up,
    following,
    slope_gate,
    slope_up,
    hidden,
    slope_share_gate,
    slope_share_up,
    tokens,
    outputs,
    stride_gate,
    stride_up,
    stride_following,
    rank_gate,
    rank_up,
    rank_following,
    SHARES: constexpr,
    FOLLOWS: constexpr,
    RANK: constexpr,
    TOKENS: constexpr,
    OUTPUTS: constexpr,
    TILES: constexpr,
    STAGES: constexpr,
):
    """A column of tiles of the gradients and of the activation, and its part of the shares' gradients."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_outputs = output < outputs
    first = tl.program_id(1).to(tl.int64) * (TOKENS * TILES)
    left = (tokens - first).to(tl.int32)
    slope += first * outputs
    gate += first * outputs
    up += first * outputs
    slope_gate += first * outputs
    slope_up += first * outputs
    hidden += first * outputs
    narrow_gate += first * stride_gate
    narrow_up += first * stride_up
    slope_following += first * stride_following
    of_gate = wide_tile(wide_gate, output, outputs, rank_gate, RANK)
    of_up = wide_tile(wide_up, output, outputs, rank_up, RANK)
    if FOLLOWS:
        number = tl.arange(0, RANK)
        in_following = (number[:, None] < rank_following) & in_outputs[None, :]
        of_following = tl.load(
            following + number[:, None] * outputs + output[None, :], mask=in_following, other=0.0
        )
    if SHARES:
        gate_share = tl.load(share_gate + output, mask=in_outputs, other=0.0)
        up_share = tl.load(share_up + output, mask=in_outputs, other=0.0)
        to_gate_share = tl.zeros([OUTPUTS], dtype=tl.float32)
        to_up_share = tl.zeros([OUTPUTS], dtype=tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        inside = token < left
        in_tile = inside[:, None] & in_outputs[None, :]
        place = token[:, None] * outputs + output[None, :]
        gate_sum = tl.load(gate + place, mask=in_tile, other=0.0).to(tl.float32)
        up_sum = tl.load(up + place, mask=in_tile, other=0.0).to(tl.float32)
        to_hidden = tl.load(slope + place, mask=in_tile, other=0.0).to(tl.float32)
        gate_narrow = narrow_tile(narrow_gate, token, inside, stride_gate, rank_gate, RANK)
        up_narrow = narrow_tile(narrow_up, token, inside, stride_up, rank_up, RANK)
        gate_sum += tl.dot(gate_narrow, of_gate, input_precision="ieee")
        up_sum += tl.dot(up_narrow, of_up, input_precision="ieee")
        if FOLLOWS:
            to_narrow = narrow_tile(slope_following, token, inside, stride_following, rank_following, RANK)
            to_hidden += tl.dot(to_narrow, of_following, input_precision="ieee")
        gate_value = gate_sum
        up_value = up_sum
        if SHARES:
            gate_value = gate_sum * gate_share[None, :]
            up_value = up_sum * up_share[None, :]
        sigmoid = tl.sigmoid(gate_value)
        activated = gate_value * sigmoid
        activation = activated * up_value
        tl.store(hidden + place, activation.to(hidden.dtype.element_ty), mask=in_tile)
        to_up = to_hidden * activated
        to_gate = to_hidden * up_value * (sigmoid + activated * (1.0 - sigmoid))
        if SHARES:
            to_gate_share += tl.sum(to_gate * gate_sum, 0)
            to_up_share += tl.sum(to_up * up_sum, 0)
            to_gate *= gate_share[None, :]
            to_up *= up_share[None, :]
        tl.store(slope_gate + place, to_gate.to(slope_gate.dtype.element_ty), mask=in_tile)
        tl.store(slope_up + place, to_up.to(slope_up.dtype.element_ty), mask=in_tile)
    if SHARES:
        part = tl.program_id(1).to(tl.int64) * outputs + output
        tl.store(slope_share_gate + part, to_gate_share, mask=in_outputs)
        tl.store(slope_share_up + part, to_up_share, mask=in_outputs)


def forward(
    gate: Tensor,
    up: Tensor,
    narrow_gate: Tensor,
    narrow_up: Tensor,
    wide_gate: Tensor,
    wide_up: Tensor,
    share_gate: Tensor | None,
    share_up: Tensor | None,
) -> Tensor:
    """The activation [B, T, F]."""
    gate = gate.contiguous()
    up = up.contiguous()
    narrow_gate = _rows(narrow_gate)
    narrow_up = _rows(narrow_up)
    tokens, outputs = _size(gate)
    ranks = (wide_gate.shape[1], wide_up.shape[1])
    hidden = torch.empty_like(gate)
    forward_kernel[_columns(tokens, outputs)](
        gate,
        up,
        narrow_gate,
        narrow_up,
        wide_gate.contiguous(),
        wide_up.contiguous(),
        share_gate,
        share_up,
        hidden,
        tokens,
        outputs,
        narrow_gate.stride(0),
        narrow_up.stride(0),
        *ranks,
        SHARES=share_gate is not None,
        **_form(ranks),
    )
    return hidden


def backward(
    slope: Tensor,
    slope_following: Tensor | None,
    gate: Tensor,
    up: Tensor,
    narrow_gate: Tensor,
    narrow_up: Tensor,
    wide_gate: Tensor,
    wide_up: Tensor,
    share_gate: Tensor | None,
    share_up: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate and up, the activation again, and the gradients [F] of the shares, or nothing."""
    gate = gate.contiguous()
    up = up.contiguous()
    narrow_gate = _rows(narrow_gate)
    narrow_up = _rows(narrow_up)
    tokens, outputs = _size(gate)
    columns = _columns(tokens, outputs)
    slope_gate = torch.empty_like(gate)
    slope_up = torch.empty_like(gate)
    hidden = torch.empty_like(gate)
    parts = (columns[1], outputs)
    if share_gate is None:
        parts = (0, 0)
    to_gate_share = torch.empty(parts, dtype=torch.float32, device=gate.device)
    to_up_share = torch.empty_like(to_gate_share)
    follows = slope_following is not None and following is not None
    if slope_following is not None and following is not None:
        to_narrow = _rows(slope_following)
        of_following = following.contiguous()
    else:  # not read
        to_narrow = narrow_gate
        of_following = wide_gate.T
    ranks = (wide_gate.shape[1], wide_up.shape[1], len(of_following))
    backward_kernel[columns](
        slope.contiguous(),
        to_narrow,
        gate,
        up,
        narrow_gate,
        narrow_up,
        wide_gate.contiguous(),
        wide_up.contiguous(),
        share_gate,
        share_up,
        of_following,
        slope_gate,
        slope_up,
        hidden,
        to_gate_share,
        to_up_share,
        tokens,
        outputs,
        narrow_gate.stride(0),
        narrow_up.stride(0),
        to_narrow.stride(0),
        *ranks,
        SHARES=share_gate is not None,
        FOLLOWS=follows,
        **_form(ranks),
    )
    return slope_gate, slope_up, hidden, to_gate_share.sum(0), to_up_share.sum(0)


def _size(value: Tensor) -> tuple[int, int]:
    """How many tokens and outputs a tensor [B, T, F] has."""
    outputs = value.shape[-1]
    tokens = value.numel() // outputs
    return tokens, outputs


def _rows(narrow: Tensor) -> Tensor:
    """Narrow products [B, T, R] as [N, R], whose rows may lie apart."""
    narrow_NR = narrow.flatten(0, -2)
    if narrow_NR.stride(1) == 1:
        return narrow_NR
    return narrow_NR.contiguous()


def _columns(tokens: int, outputs: int) -> tuple[int, int]:
    """How many columns of tiles there are, side by side and below one another."""
    return triton.cdiv(outputs, OUTPUTS), triton.cdiv(tokens, TOKENS * TILES)


def _form(ranks: tuple[int, ...]) -> dict[str, int]:
    """The form of a column; tensor cores take ranks that are powers of two, 16 at least."""
    largest = max(ranks)
    rank = max(16, triton.next_power_of_2(largest))
    return {
        "RANK": rank,
        "TOKENS": TOKENS,
        "OUTPUTS": OUTPUTS,
        "TILES": TILES,
        "STAGES": STAGES,
        "num_warps": WARPS,
    }
