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
        self.base, self.pool = base, pool
        self.stride = pool.table_KLSC.stride(0)
        self.side = torch.cuda.Stream() if base.device.type == "cuda" else None

    @contextmanager
    def meanwhile(self, step: Pass, group: Group, layer: int, x_TI: Tensor) -> Iterator[Callable[[Tensor], None]]:
        """While the base's product is computed; gives what adds the adapters' to it, to be called afterwards."""
        work = step.before
        if work is None:
            yield lambda y_TO: None  # noqa: ARG005
        elif work.rows > FEW:
            yield lambda y_TO: self._into(work, group, self._entry(layer, group, ""), x_TI, y_TO)
        else:
            with self._aside():
                shares_PTO = self._shares(work, group, self._entry(layer, group, ""), x_TI)
            yield lambda y_TO: self._add(work, group, shares_PTO, y_TO)

    def behind(self, work: Work, group: Group, layer: int, y_TO: Tensor) -> None:
        """Add what bottlenecks make of a group's outputs."""
        entry = self._entry(layer, group, BEHIND)
        h_TSR = self._shrink(work, entry, y_TO, group.out, 1, 1)
        self._expand(work, group, entry, h_TSR, y_TO, 1, 1, True)

    def _entry(self, layer: int, group: Group, suffix: str) -> Tensor:
        return self.pool.table_KLSC[0, layer, self.base.sites[group.sites[0].name + suffix]]

    def _aside(self) -> AbstractContextManager[Any]:
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def _into(self, work: Work, group: Group, entry: Tensor, x_TI: Tensor, y_TO: Tensor) -> None:
        sections = len(group.sites)
        h_TSR = self._shrink(work, entry, x_TI, x_TI.shape[1], sections, 1)
        self._expand(work, group, entry, h_TSR, y_TO, sections, 1, False)

    def _shares(self, work: Work, group: Group, entry: Tensor, x_TI: Tensor) -> Tensor:
        sections, inputs = len(group.sites), x_TI.shape[1]
        h_TSR = self._shrink(work, entry, x_TI, inputs, sections, max(1, inputs // SHARE))
        shares = SHARES if group.out <= MANY else SHARES // 2
        shares_PTO = x_TI.new_empty(shares, len(x_TI), group.out, dtype=torch.float32)
        self._expand(work, group, entry, h_TSR, shares_PTO[0], sections, shares, False)
        return shares_PTO

    def _add(self, work: Work, group: Group, shares_PTO: Tensor, y_TO: Tensor) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        add_kernel[(len(work.segment), triton.cdiv(group.out, 128))](
            y_TO, shares_PTO, work.segment, work.order_T, group.out, y_TO.stride(0), shares_PTO.stride(1),
            shares_PTO.stride(0), T=work.rows, N=128, SHARES=len(shares_PTO), num_warps=4,
        )  # fmt: skip

    def _shrink(self, work: Work, entry: Tensor, x_TI: Tensor, inputs: int, sections: int, parts: int) -> Tensor:
        kind = torch.float32 if parts > 1 else x_TI.dtype
        h_TSPR = torch.empty(len(x_TI), sections, parts, work.rank, dtype=kind, device=x_TI.device)
        shrink_kernel[(len(work.task), sections, parts)](
            x_TI, h_TSPR, work.task, work.order_T, entry, self.pool.arena.data, inputs, triton.cdiv(inputs, parts),
            x_TI.stride(0), *h_TSPR.stride()[:3], self.stride, len(COLUMNS), T=work.rows, R=work.ranks,
            K=128 if work.rows == FEW else 64, num_warps=4, num_stages=4,
        )  # fmt: skip
        return (h_TSPR.sum(2) if parts > 1 else h_TSPR[:, :, 0]).to(x_TI.dtype)

    def _expand(
        self, work: Work, group: Group, entry: Tensor, h_TSR: Tensor, y_TO: Tensor, sections: int,
        shares: int, behind: bool,
    ) -> None:  # fmt: skip
        starts = [site.start for site in group.sites[1:]] if sections > 1 else []
        few, wide = work.rows == FEW, work.rank > 64
        tile = gcd((64 if group.out > MANY else 32) if few else 256 if wide else 128, group.out, *starts)
        grid = (len(work.segment), triton.cdiv(group.out, tile), shares)
        expand_kernel[grid](
            y_TO, h_TSR, work.segment, work.order_T, entry, self.pool.arena.data, group.out,
            *[*starts, FOREVER, FOREVER][:2], y_TO.stride(0), y_TO.stride(0) * len(y_TO), *h_TSR.stride()[:2],
            self.stride, len(COLUMNS), T=work.rows, N=tile, SHARES=shares, BEHIND=behind,
            R=min(128 if few else 64, max(16, triton.next_power_of_2(work.rank))), num_warps=4, num_stages=3,
        )  # fmt: skip
