"""What the grouped kernels have to do for a pass: tasks of rows that share an adapter, made on the host.

Shapes: T rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.mix import Tenant
from serving.packed import Needs

FEW, MANY = 16, 64  # rows of a tile: when decoding the fewest that tensor cores take, and over prompts


@dataclass
class Work:
    """Tasks [n, 4] of (slot, first rank, first row, rows), segments (with first rank 0), and the rows they mean."""

    task: Tensor
    segment: Tensor
    order_T: Tensor
    rank: int  # the largest
    rows: int  # of a tile
    ranks: int  # of a tile

    @classmethod
    def of(cls, tenants: list[Tenant], rank_of: Callable[[Needs], int], rows: int) -> "Work | None":
        """The work for the tenants that have a rank at all, in tiles of so many rows; None where there is none."""
        chosen: list[tuple[Tenant, int]] = []
        for tenant in tenants:
            rank = rank_of(tenant.resident.packed.needs)
            if rank:
                chosen.append((tenant, rank))
        if not chosen:
            return None
        largest = max(rank for _, rank in chosen)
        tile = ranks_of_tile(largest, rows)
        tasks: list[tuple[int, ...]] = []
        segments: list[tuple[int, ...]] = []
        for slot, rank, first_row, count in _segments(chosen, rows):
            segments.append((slot, 0, first_row, count))
            for first_rank in range(0, rank, tile):
                tasks.append((slot, first_rank, first_row, count))
        order_T = torch.cat([tenant.row_T for tenant, _ in chosen])
        return cls(torch.tensor(tasks).int(), torch.tensor(segments).int(), order_T.int(), largest, rows, tile)

    def to(self, device: torch.device) -> "Work":
        """The same on a device."""
        task = self.task.to(device, non_blocking=True)
        segment = self.segment.to(device, non_blocking=True)
        order_T = self.order_T.to(device, non_blocking=True)
        return replace(self, task=task, segment=segment, order_T=order_T)


def ranks_of_tile(largest: int, rows: int) -> int:
    """How many ranks a task has at most, where the largest rank is this and a tile has so many rows."""
    if largest <= 16:
        return 16
    if rows == FEW or largest <= 32:
        return 32
    return 64


def _segments(chosen: list[tuple[Tenant, int]], rows: int) -> Iterator[tuple[int, int, int, int]]:
    """The tiles of rows that share an adapter: slot, rank, first row in the order, number of rows."""
    first = 0
    for tenant, rank in chosen:
        count = len(tenant.row_T)
        for start in range(0, count, rows):
            size = min(rows, count - start)
            yield tenant.resident.slot, rank, first + start, size
        first += count


def padded(table: Tensor, count: int) -> Tensor:
    """Tasks with so many more of no rows that there are `count`."""
    filled = table.new_zeros(count, table.shape[1])
    filled[: len(table)] = table
    return filled


def enlarged(work: Work | None, rows: int) -> Work | None:
    """Work with as many tasks as the next power of two, and rows for the whole batch."""
    if work is None:
        return None
    task = padded(work.task, power_of_2(len(work.task)))
    segment = padded(work.segment, power_of_2(len(work.segment)))
    order_T = work.order_T.new_zeros(rows)
    return replace(work, task=task, segment=segment, order_T=order_T)


def fill(static: Work | None, work: Work | None) -> None:
    """Copy work into a graph's."""
    if static is None or work is None:
        return
    static.task.copy_(padded(work.task, len(static.task)))
    static.segment.copy_(padded(work.segment, len(static.segment)))
    count = len(work.order_T)
    static.order_T[:count].copy_(work.order_T)


def power_of_2(number: int) -> int:
    """The next power of two from a number above 0 on."""
    bits = (number - 1).bit_length()
    return 1 << bits
