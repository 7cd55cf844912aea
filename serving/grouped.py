"""Low-rank products of adapters in grouped kernels: those of all adapters over prompts, of wide ones when decoding.

When decoding they run beside the base's dense product, on a stream of their own, and are added when both are done: a
dense product over few rows leaves some of the GPU to others. Tiles are the best of those tried on an H200.
Shapes: T rows, I inputs, O outputs, N outputs and what lies behind them, S sections, P parts, H shares, R ranks.
"""

from contextlib import AbstractContextManager, nullcontext
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from serving.base import BEHIND, FrozenBase
from serving.group import Group
from serving.grouping import FEWEST_RANKS, MANY, Grouping, Tiles, Work, inputs_of_share
from serving.kernel.factor import add_kernel, expand_kernel, shrink_kernel
from serving.pool import Pool

NO_SECTION = 2**30  # where a section begins that is not there
INPUTS = 2048  # that one program sums where there are few rows
SHARES = 4  # programs that share the ranks of a tile of outputs then
LARGE_OUTPUTS = 4096  # outputs from which on half as many do
ADDED = 128  # outputs that one program adds


class Grouped:
    """Launches the grouped kernels."""

    def __init__(self, base: FrozenBase, pool: Pool) -> None:
        self.pool = pool
        self.arena = pool.arena.data
        self.stride = pool.adapter_stride
        self.side: torch.cuda.Stream | None = None
        if base.on_gpu:
            self.side = torch.cuda.Stream()

    def begin(self, grouping: Grouping, group: Group, layer: int, x_TI: Tensor) -> Tensor | None:
        """Start the updates of few rows; gives what is to be added to the outputs by `finish`, if anything is."""
        if grouping.before is None:
            return None
        tiles = grouping.tiles
        with self._aside():
            return self._shares(grouping.before, tiles, group, layer, x_TI)

    def finish(self, grouping: Grouping, shares_HTO: Tensor | None, y_TN: Tensor) -> None:
        """Add to the outputs what `begin` has started."""
        work = grouping.before
        tiles = grouping.tiles
        if work is None:
            return
        if shares_HTO is None:
            return
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        shares, _, outputs = shares_HTO.shape
        share_stride, row_stride, _ = shares_HTO.stride()
        output_tiles = triton.cdiv(outputs, ADDED)
        grid = (work.segments, output_tiles)
        add_kernel[grid](
            y_TN,
            shares_HTO,
            work.segment,
            tiles.row_GF,
            outputs,
            y_TN.stride(0),
            row_stride,
            share_stride,
            T=tiles.rows,
            N=ADDED,
            SHARES=shares,
            num_warps=4,
        )

    def add(self, grouping: Grouping, group: Group, layer: int, x_TI: Tensor, y_TN: Tensor) -> None:
        """Add the updates of adapters to the outputs."""
        work = grouping.before
        if work is None:
            return
        size = (len(x_TI), group.sections, work.rank)
        h_TSR = x_TI.new_empty(size)
        self.shrink(grouping, group, layer, x_TI, h_TSR)
        self.expand(grouping, group, layer, h_TSR, y_TN)

    def add_bottlenecks(self, grouping: Grouping, group: Group, layer: int, y_TN: Tensor) -> None:
        """Add what bottlenecks make of a group's outputs."""
        work = grouping.behind
        if work is None:
            return
        submodule = group.first_linear + BEHIND
        entry = self.pool.entry(layer, submodule)
        size = (len(y_TN), 1, work.rank)
        h_TSR = y_TN.new_empty(size)
        tiles = grouping.tiles
        h_1TSR = h_TSR[None]
        y_1TN = y_TN[None]
        self._shrink(work, tiles, entry, y_TN, group.outputs, h_1TSR)
        self._expand(work, tiles, entry, group, h_TSR, y_1TN, True)

    def shrink(self, grouping: Grouping, group: Group, layer: int, x_TI: Tensor, h_TSR: Tensor) -> None:
        """Write the products of the inputs with the first factors."""
        work = grouping.before
        assert work is not None
        tiles = grouping.tiles
        entry = self.pool.entry(layer, group.first_linear)
        inputs = x_TI.shape[1]
        h_1TSR = h_TSR[None]
        self._shrink(work, tiles, entry, x_TI, inputs, h_1TSR)

    def expand(self, grouping: Grouping, group: Group, layer: int, h_TSR: Tensor, y_TN: Tensor) -> None:
        """Add the products of h with the second factors to the outputs."""
        work = grouping.before
        assert work is not None
        tiles = grouping.tiles
        entry = self.pool.entry(layer, group.first_linear)
        y_1TN = y_TN[None]
        self._expand(work, tiles, entry, group, h_TSR, y_1TN, False)

    def _aside(self) -> AbstractContextManager[Any]:
        """Run kernels on the stream of their own, behind what was launched before."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def _shares(self, work: Work, tiles: Tiles, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The products [H, T, O] of the inputs with both factors, in shares that are still to be summed."""
        rows, inputs = x_TI.shape
        entry = self.pool.entry(layer, group.first_linear)
        parts = max(1, inputs // INPUTS)
        dtype = x_TI.dtype
        if parts > 1:
            dtype = torch.float32
        size = (parts, rows, group.sections, work.rank)
        h_PTSR = x_TI.new_empty(size, dtype=dtype)
        self._shrink(work, tiles, entry, x_TI, inputs, h_PTSR)
        h_TSR = h_PTSR[0]
        if parts > 1:
            sum_TSR = h_PTSR.sum(0)
            h_TSR = sum_TSR.to(x_TI.dtype)
        shares = SHARES
        if group.outputs > LARGE_OUTPUTS:
            shares = SHARES // 2
        shares_size = (shares, rows, group.outputs)
        shares_HTO = x_TI.new_empty(shares_size, dtype=torch.float32)
        self._expand(work, tiles, entry, group, h_TSR, shares_HTO, False)
        return shares_HTO

    def _shrink(self, work: Work, tiles: Tiles, entry: Tensor, x_TI: Tensor, inputs: int, h_PTSR: Tensor) -> None:
        """Write the products of the inputs with the first factor, for which programs share the inputs in parts."""
        parts, _, sections, _ = h_PTSR.shape
        part_stride, row_stride, section_stride, _ = h_PTSR.stride()
        step = 64
        if tiles.rows < MANY:
            step = 128
        share = inputs_of_share(inputs, parts, step)
        grid = (work.tasks, sections, parts)
        shrink_kernel[grid](
            x_TI,
            h_PTSR,
            work.task,
            tiles.adapter_G,
            tiles.row_GF,
            entry,
            self.arena,
            inputs,
            share,
            x_TI.stride(0),
            part_stride,
            row_stride,
            section_stride,
            self.stride,
            T=tiles.rows,
            R=work.ranks,
            K=step,
            num_warps=4,
            num_stages=4,
        )

    def _expand(
        self, work: Work, tiles: Tiles, entry: Tensor, group: Group, h_TSR: Tensor, y_HTN: Tensor, behind: bool
    ) -> None:
        """Add the products of h with the second factor to y, or write them to as many y as there are shares."""
        row_stride, section_stride, _ = h_TSR.stride()
        y_share, y_stride, _ = y_HTN.stride()
        starts: list[int] = []
        if h_TSR.shape[1] > 1:
            starts = [linear_layer.start for linear_layer in group.linears[1:]]
        second, third, *_ = [*starts, NO_SECTION, NO_SECTION]
        most = outputs_of_tile(work, tiles)
        tile = gcd(most, group.outputs, *starts)
        shares = len(y_HTN)
        output_tiles = triton.cdiv(group.outputs, tile)
        grid = (work.segments, output_tiles, shares)
        expand_kernel[grid](
            y_HTN,
            h_TSR,
            work.segment,
            tiles.adapter_G,
            tiles.row_GF,
            entry,
            self.arena,
            group.outputs,
            second,
            third,
            y_share,
            y_stride,
            row_stride,
            section_stride,
            self.stride,
            T=tiles.rows,
            R=ranks_of_step(work, tiles),
            N=tile,
            SHARES=shares,
            BEHIND=behind,
            num_warps=4,
            num_stages=3,
        )


def outputs_of_tile(work: Work, tiles: Tiles) -> int:
    """How many outputs a program of the second factor computes at most."""
    if tiles.rows < MANY:
        return 64
    if work.rank > 64:
        return 256
    return 128


def ranks_of_step(work: Work, tiles: Tiles) -> int:
    """How many ranks a program of the second factor takes at a time."""
    most = 64
    if tiles.rows < MANY:
        most = 128
    ranks: int = triton.next_power_of_2(work.rank)
    ranks = min(most, ranks)
    return max(FEWEST_RANKS, ranks)
