"""The kernels of `gate.py`, on a GPU: a program goes down a column of tiles, and reads one while it computes another.

Shapes: N tokens, F outputs of gate and up, R rank.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from trainer.kernels.gate import Sides

# Tokens of a tile, and tiles of a column.
COLUMN = {"TOKENS": 32, "TILES": 8, "num_warps": 4}
# Outputs of a tile, and tiles that are read ahead and computed: of 14 forms that were tried on an H200 (8,192 tokens
# and outputs, rank 16) the first was the fastest; the others are for what takes more shared memory than a device has.
FORMS = ((128, 3), (128, 2), (64, 2), (32, 1))
RESERVED = 4096  # bytes of shared memory
Tiling = dict[str, int]  # arguments of a kernel that it is compiled for


@triton.jit
def wide_tile(wide, output, outputs, stride_output, stride_rank, rank, RANK: constexpr):
    """A tile [R, F] of a weight."""
    number = tl.arange(0, RANK)
    in_tile = (number[:, None] < rank) & (output[None, :] < outputs)
    place = output[None, :] * stride_output + number[:, None] * stride_rank
    return tl.load(wide + place, mask=in_tile, other=0.0)


@triton.jit
def share_of(share, output, outputs, SHARES: constexpr):
    """The shares of a tile's outputs, 1 where there are none."""
    of_outputs = 1.0
    if SHARES:
        of_outputs = tl.load(share + output, mask=output < outputs, other=0.0)[None, :]
    return of_outputs


@triton.jit
def narrow_tile(narrow, token, left, stride, rank, RANK: constexpr):
    """A tile [N, R] of narrow products."""
    number = tl.arange(0, RANK)
    in_tile = (token[:, None] < left) & (number[None, :] < rank)
    return tl.load(narrow + token[:, None] * stride + number[None, :], mask=in_tile, other=0.0)


@triton.jit
def low_rank_tile(base, place, in_tile, narrow, wide):
    """A tile of base + B a, fp32."""
    value = tl.load(base + place, mask=in_tile, other=0.0)
    return value.to(tl.float32) + tl.dot(narrow, wide, input_precision="ieee")


@triton.jit
def store_tile(pointer, place, in_tile, value):
    """Round a tile to what it is kept in, and write it."""
    rounded = value.to(pointer.dtype.element_ty)
    tl.store(pointer + place, rounded, mask=in_tile)


@triton.jit
def column_of(tokens, TOKENS: constexpr, OUTPUTS: constexpr, TILES: constexpr):
    """The outputs of this program's column, its first token, and how many tokens are left from there."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1).to(tl.int64) * (TOKENS * TILES)
    left = (tokens - first).to(tl.int32)
    return output, first, left


@triton.jit
def tile_places(tile, output, left, outputs, TOKENS: constexpr):
    """The tokens of a tile, where its values lie from the column's first, and which of them there are."""
    token = tile * TOKENS + tl.arange(0, TOKENS)
    place = token[:, None] * outputs + output[None, :]
    in_tile = (token[:, None] < left) & (output[None, :] < outputs)
    return token, place, in_tile


@triton.jit
def forward_kernel(
    gate, up, narrow_gate, narrow_up, wide_gate, wide_up, share_gate, share_up, hidden,
    tokens, outputs, stride_gate, stride_up, rank_gate, rank_up,
    SHARES: constexpr, RANK: constexpr,
    TOKENS: constexpr, OUTPUTS: constexpr, TILES: constexpr, STAGES: constexpr,
):  # fmt: skip
    """A column of tiles of silu(gate) * up."""
    output, first, left = column_of(tokens, TOKENS, OUTPUTS, TILES)
    start = first * outputs
    of_gate = wide_tile(wide_gate, output, outputs, rank_gate, 1, rank_gate, RANK)
    of_up = wide_tile(wide_up, output, outputs, rank_up, 1, rank_up, RANK)
    gate_share = share_of(share_gate, output, outputs, SHARES)
    up_share = share_of(share_up, output, outputs, SHARES)
    gate_rows = narrow_gate + first * stride_gate
    up_rows = narrow_up + first * stride_up
    for tile in tl.range(TILES, num_stages=STAGES):
        token, place, in_tile = tile_places(tile, output, left, outputs, TOKENS)
        gate_narrow = narrow_tile(gate_rows, token, left, stride_gate, rank_gate, RANK)
        gate_sum = low_rank_tile(gate + start, place, in_tile, gate_narrow, of_gate)
        up_narrow = narrow_tile(up_rows, token, left, stride_up, rank_up, RANK)
        up_sum = low_rank_tile(up + start, place, in_tile, up_narrow, of_up)
        gate_value = gate_sum * gate_share
        up_value = up_sum * up_share
        activation = gate_value * tl.sigmoid(gate_value) * up_value
        store_tile(hidden + start, place, in_tile, activation)


@triton.jit
def slopes_of(to_hidden, gate_value, up_value):
    """The gradients of gate and up, and the activation."""
    sigmoid = tl.sigmoid(gate_value)
    activated = gate_value * sigmoid
    to_activated = to_hidden * up_value
    to_gate = to_activated * (sigmoid + activated * (1.0 - sigmoid))
    return to_gate, to_hidden * activated, activated * up_value


@triton.jit
def backward_kernel(
    slope, gate, up, narrow_slope, narrow_gate, narrow_up, following, wide_gate, wide_up, share_gate, share_up,
    slope_gate, slope_up, hidden, slope_share_gate, slope_share_up,
    tokens, outputs, stride_slope, stride_gate, stride_up, rank_slope, rank_gate, rank_up,
    SHARES: constexpr, RANK: constexpr,
    TOKENS: constexpr, OUTPUTS: constexpr, TILES: constexpr, STAGES: constexpr,
):  # fmt: skip
    """A column of tiles of the gradients and of the activation, and its part of the shares' gradients."""
    output, first, left = column_of(tokens, TOKENS, OUTPUTS, TILES)
    start = first * outputs
    of_following = wide_tile(following, output, outputs, 1, outputs, rank_slope, RANK)
    of_gate = wide_tile(wide_gate, output, outputs, rank_gate, 1, rank_gate, RANK)
    of_up = wide_tile(wide_up, output, outputs, rank_up, 1, rank_up, RANK)
    gate_share = share_of(share_gate, output, outputs, SHARES)
    up_share = share_of(share_up, output, outputs, SHARES)
    to_gate_share = tl.zeros([OUTPUTS], dtype=tl.float32)
    to_up_share = tl.zeros([OUTPUTS], dtype=tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        token, place, in_tile = tile_places(tile, output, left, outputs, TOKENS)
        slope_narrow = narrow_tile(narrow_slope + first * stride_slope, token, left, stride_slope, rank_slope, RANK)
        to_hidden = low_rank_tile(slope + start, place, in_tile, slope_narrow, of_following)
        gate_narrow = narrow_tile(narrow_gate + first * stride_gate, token, left, stride_gate, rank_gate, RANK)
        gate_sum = low_rank_tile(gate + start, place, in_tile, gate_narrow, of_gate)
        up_narrow = narrow_tile(narrow_up + first * stride_up, token, left, stride_up, rank_up, RANK)
        up_sum = low_rank_tile(up + start, place, in_tile, up_narrow, of_up)
        to_gate, to_up, activation = slopes_of(to_hidden, gate_sum * gate_share, up_sum * up_share)
        store_tile(hidden + start, place, in_tile, activation)
        store_tile(slope_gate + start, place, in_tile, to_gate * gate_share)
        store_tile(slope_up + start, place, in_tile, to_up * up_share)
        if SHARES:
            to_gate_share += tl.sum(to_gate * gate_sum, 0)
            to_up_share += tl.sum(to_up * up_sum, 0)
    if SHARES:
        part = tl.program_id(1).to(tl.int64) * outputs + output
        tl.store(slope_share_gate + part, to_gate_share, mask=output < outputs)
        tl.store(slope_share_up + part, to_up_share, mask=output < outputs)


def gated_forward(sides: Sides) -> Tensor:
    """The activation [B, T, F]."""
    laid = _laid_out(sides)
    tokens, outputs = _tokens_and_outputs(laid.gate)
    hidden = torch.empty_like(laid.gate)
    ranks = (laid.wide_gate.shape[1], laid.wide_up.shape[1])
    rank = _rank_of_tiles(ranks)
    tiling = _tiling(laid.gate, rank)
    forward_kernel[_columns(tokens, outputs, tiling)](
        *laid,
        hidden,
        tokens,
        outputs,
        laid.narrow_gate.stride(0),
        laid.narrow_up.stride(0),
        *ranks,
        SHARES=laid.share_gate is not None,
        RANK=rank,
        **tiling,
    )
    return hidden


def gated_slopes(
    slope: Tensor, slope_following: Tensor | None, sides: Sides, following: Tensor | None
) -> list[Tensor]:
    """The gradients of gate and up, the activation again, and those of the shares [F], where there are any."""
    laid = _laid_out(sides)
    tokens, outputs = _tokens_and_outputs(laid.gate)
    has_shares = laid.share_gate is not None
    if slope_following is None or following is None:  # of rank 0, so nothing of it is read
        slope_following = laid.narrow_gate
        following = laid.gate.new_empty(0, outputs)
    like_gate = [torch.empty_like(laid.gate) for _ in range(3)]
    ranks = (len(following), laid.wide_gate.shape[1], laid.wide_up.shape[1])
    rank = _rank_of_tiles(ranks)
    tiling = _tiling(laid.gate, rank)
    columns = _columns(tokens, outputs, tiling)
    parts = (columns[1], outputs) if has_shares else (0, 0)
    share_parts = [torch.empty(parts, dtype=torch.float32, device=slope.device) for _ in range(2)]
    narrow = (_rows_of(slope_following), laid.narrow_gate, laid.narrow_up)
    wide = (following.contiguous(), laid.wide_gate, laid.wide_up)
    backward_kernel[columns](
        slope.contiguous(),
        laid.gate,
        laid.up,
        *narrow,
        *wide,
        laid.share_gate,
        laid.share_up,
        *like_gate,
        *share_parts,
        tokens,
        outputs,
        *(rows.stride(0) for rows in narrow),
        *ranks,
        SHARES=has_shares,
        RANK=rank,
        **tiling,
    )
    if not has_shares:
        return like_gate
    slopes_of_shares = [part.sum(0) for part in share_parts]
    return like_gate + slopes_of_shares


def _laid_out(sides: Sides) -> Sides:
    """The same tensors as the kernels read them: whole, and narrow products [N, R] whose rows may lie apart."""
    return sides._replace(
        gate=sides.gate.contiguous(),
        up=sides.up.contiguous(),
        narrow_gate=_rows_of(sides.narrow_gate),
        narrow_up=_rows_of(sides.narrow_up),
        wide_gate=sides.wide_gate.contiguous(),
        wide_up=sides.wide_up.contiguous(),
    )


def _rows_of(narrow: Tensor) -> Tensor:
    """Narrow products [B, T, R] as [N, R]."""
    narrow_NR = narrow.flatten(0, -2)
    if narrow_NR.stride(1) == 1:
        return narrow_NR
    return narrow_NR.contiguous()


def _tokens_and_outputs(value: Tensor) -> tuple[int, int]:
    """How many there are of both in a tensor [B, T, F]."""
    outputs = value.shape[-1]
    return value.numel() // outputs, outputs


def _columns(tokens: int, outputs: int, tiling: Tiling) -> tuple[int, int]:
    """How many columns of tiles there are, side by side and below one another."""
    side_by_side = triton.cdiv(outputs, tiling["OUTPUTS"])
    column_tokens = tiling["TOKENS"] * tiling["TILES"]
    below = triton.cdiv(tokens, column_tokens)
    return side_by_side, below


def _rank_of_tiles(ranks: tuple[int, ...]) -> int:
    """The smallest rank that holds all: a power of two, 16 at least, as tensor cores take it."""
    smallest: int = triton.next_power_of_2(max(ranks))
    return max(16, smallest)


def _tiling(value: Tensor, rank: int) -> Tiling:
    """The first form of tiles that fits a device's shared memory; the last one, where none does."""
    shared = _shared_memory(value.device.index)
    for outputs, stages in FORMS:
        needed = _shared_bytes(outputs, stages, rank, value.itemsize)
        if needed <= shared:
            break
    return COLUMN | {"OUTPUTS": outputs, "STAGES": stages}


@cache
def _shared_memory(device: int) -> int:
    """The bytes of shared memory that a program may take on a device; kept, as the driver takes a millisecond."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    bytes_of_a_program: int = properties["max_shared_mem"]
    return bytes_of_a_program


def _shared_bytes(outputs: int, stages: int, rank: int, itemsize: int) -> int:
    """What a program takes: three weights, and three values and products of each tile that is read ahead."""
    ahead = max(1, stages - 1)
    tokens = COLUMN["TOKENS"]
    weights = rank * outputs
    read_ahead = ahead * tokens * (outputs + rank)
    elements = 3 * weights + 3 * read_ahead
    return elements * itemsize + RESERVED
