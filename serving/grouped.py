"""Low-rank products of adapters in grouped kernels: those of all adapters over prompts, of wide ones when decoding.

When decoding they run beside the base's dense product, on a stream of their own, and are added when both are done: a
dense product over few rows leaves most of the GPU to others. Tiles are the best of those tried on an H200.
Shapes: T rows, I inputs, O outputs, S sections, P parts, R ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from serving.base import BEHIND, Base, Group
from serving.kernel.factor import add_kernel, expand_kernel, shrink_kernel
from serving.packed import COLUMNS
from serving.passing import Pass
from serving.pool import Pool
from serving.work import FEW, Work

FOREVER = 2**30  # where a section begins that is not there
SHARE = 2048  # inputs that one program sums where there are few rows
SHARES = 4  # programs that share the ranks of a tile of outputs then
MANY = 4096  # outputs from which on tiles are larger


class Grouped:
    """Launches the grouped kernels."""

    def __init__(self, base: Base, pool: Pool) -> None:
        self.base = base
        self.pool = pool
        self.stride = pool.table_KLSC.stride(0)
        self.side: torch.cuda.Stream | None = None
        if base.on_gpu:
            self.side = torch.cuda.Stream()

    @contextmanager
    def meanwhile(self, step: Pass, group: Group, layer: int, x_TI: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """While the base's product is computed; gives what adds the adapters' to it, to be called afterwards."""
        work = step.before
        if work is None:
            yield lambda y_TO: None  # noqa: ARG005
            return
        entry = self._entry(layer, group, "")
        if work.rows > FEW:
            yield lambda y_TO: self._add_products(work, group, entry, x_TI, y_TO)
            return
        with self._aside():
            shares_PTO = self._shares(work, group, entry, x_TI)
        yield lambda y_TO: self._add_shares(work, group, shares_PTO, y_TO)

    def behind(self, work: Work, group: Group, layer: int, y_TO: Tensor) -> None:
        """Add what bottlenecks make of a group's outputs."""
        entry = self._entry(layer, group, BEHIND)
        h_TSR = self._shrink(work, entry, y_TO, group.out, 1, 1)
        self._expand(work, group, entry, h_TSR, y_TO, 1, 1, True)

    def _entry(self, layer: int, group: Group, suffix: str) -> Tensor:
        """The table from the entry of a group's first site on, or of the bottleneck behind it."""
        name = group.sites[0].name + suffix
        return self.pool.table_KLSC[0, layer, self.base.sites[name]]

    def _aside(self) -> AbstractContextManager[Any]:
        """Run kernels on the stream of their own, behind what was launched before."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def _add_products(self, work: Work, group: Group, entry: Tensor, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add the products of the inputs with both factors to the outputs."""
        sections = len(group.sites)
        h_TSR = self._shrink(work, entry, x_TI, x_TI.shape[1], sections, 1)
        self._expand(work, group, entry, h_TSR, y_TO, sections, 1, False)

    def _shares(self, work: Work, group: Group, entry: Tensor, x_TI: Tensor) -> Tensor:
        """The products [P, T, O] of the inputs with both factors, in parts that are still to be summed."""
        rows, inputs = x_TI.shape
        sections = len(group.sites)
        parts = max(1, inputs // SHARE)
        h_TSR = self._shrink(work, entry, x_TI, inputs, sections, parts)
        shares = SHARES
        if group.out > MANY:
            shares = SHARES // 2
        shares_PTO = x_TI.new_empty(shares, rows, group.out, dtype=torch.float32)
        self._expand(work, group, entry, h_TSR, shares_PTO[0], sections, shares, False)
        return shares_PTO

    def _add_shares(self, work: Work, group: Group, shares_PTO: Tensor, y_TO: Tensor) -> None:
        """Add the parts of the products to the outputs, when both are computed."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        tile = 128
        grid = (len(work.segment), triton.cdiv(group.out, tile))
        shares = len(shares_PTO)
        part_stride, row_stride, _ = shares_PTO.stride()
        add_kernel[grid](
            y_TO, shares_PTO, work.segment, work.order_T, group.out, y_TO.stride(0), row_stride, part_stride,
            T=work.rows, N=tile, SHARES=shares, num_warps=4,
        )  # fmt: skip

    def _shrink(self, work: Work, entry: Tensor, x_TI: Tensor, inputs: int, sections: int, parts: int) -> Tensor:
        """The products [T, S, R] of inputs with the first factor, for which programs share the inputs in parts."""
        dtype = x_TI.dtype
        if parts > 1:
            dtype = torch.float32
        h_TSPR = x_TI.new_empty(len(x_TI), sections, parts, work.rank, dtype=dtype)
        row_stride, section_stride, part_stride, _ = h_TSPR.stride()
        arena = self.pool.arena.data
        share = triton.cdiv(inputs, parts)
        step = 64
        if work.rows == FEW:
            step = 128
        grid = (len(work.task), sections, parts)
        shrink_kernel[grid](
            x_TI, h_TSPR, work.task, work.order_T, entry, arena, inputs, share, x_TI.stride(0), row_stride,
            section_stride, part_stride, self.stride, len(COLUMNS), T=work.rows, R=work.ranks, K=step, num_warps=4,
            num_stages=4,
        )  # fmt: skip
        if parts == 1:
            return h_TSPR[:, :, 0]
        return h_TSPR.sum(2).to(x_TI.dtype)

    def _expand(
        self, work: Work, group: Group, entry: Tensor, h_TSR: Tensor, y_TO: Tensor, sections: int, shares: int,
        behind: bool,
    ) -> None:  # fmt: skip
        """Add the products of h with the second factor to y, or write them to as many y as there are shares."""
        starts: list[int] = []
        if sections > 1:
            starts = [site.start for site in group.sites[1:]]
        second, third, *_ = [*starts, FOREVER, FOREVER]
        tile = gcd(outputs_of_tile(work, group), group.out, *starts)
        grid = (len(work.segment), triton.cdiv(group.out, tile), shares)
        arena = self.pool.arena.data
        y_stride = y_TO.stride(0)
        y_size = y_stride * len(y_TO)
        h_stride, section_stride, _ = h_TSR.stride()
        expand_kernel[grid](
            y_TO, h_TSR, work.segment, work.order_T, entry, arena, group.out, second, third, y_stride, y_size,
            h_stride, section_stride, self.stride, len(COLUMNS), T=work.rows, N=tile, SHARES=shares, BEHIND=behind,
            R=ranks_of_step(work), num_warps=4, num_stages=3,
        )  # fmt: skip


def outputs_of_tile(work: Work, group: Group) -> int:
    """How many outputs a program of the second factor computes at most."""
    if work.rows != FEW:
        return 256 if work.rank > 64 else 128
    return 64 if group.out > MANY else 32


def ranks_of_step(work: Work) -> int:
    """How many ranks a program of the second factor takes at a time."""
    most = 64
    if work.rows == FEW:
        most = 128
    ranks: int = max(16, triton.next_power_of_2(work.rank))
    return min(most, ranks)
