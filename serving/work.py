"""What the grouped kernels have to do for a pass: tasks of rows that share an adapter, made on the host.

Shapes: T rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.mix import Tenant
from serving.packed import Needs

FEW, MANY = 16, 64  # rows of a tile: when decoding the fewest that tensor cores take, and over prompts


@dataclass
class Work:
    """Tasks [n, 4] of (slot, first rank, first row, rows), segments (with first rank 0), and the rows they mean."""

    task: torch.Tensor
    segment: torch.Tensor
    order_T: torch.Tensor
    rank: int  # the largest
    rows: int  # of a tile
    ranks: int  # of a tile

    @classmethod
    def of(cls, tenants: list[Tenant], rank_of: Callable[[Needs], int], rows: int) -> "Work | None":
        """The work for the tenants that have a rank at all, in tiles of so many rows; None where there is none."""
        ranked = [(tenant, rank_of(tenant.resident.packed.needs)) for tenant in tenants]
        chosen = [(tenant, rank) for tenant, rank in ranked if rank]
        if not chosen:
            return None
        most = max(rank for _, rank in chosen)
        tile = 16 if most <= 16 else 32 if rows == FEW or most <= 32 else 64
        tasks, segments, first = [], [], 0
        for tenant, rank in chosen:
            slot, count = tenant.resident.slot, len(tenant.row_T)
            for start in range(0, count, rows):
                part = first + start, min(rows, count - start)
                segments.append((slot, 0, *part))
                tasks += [(slot, low, *part) for low in range(0, rank, tile)]
            first += count
        order_T = torch.cat([tenant.row_T for tenant, _ in chosen]).int()
        return cls(torch.tensor(tasks).int(), torch.tensor(segments).int(), order_T, most, rows, tile)

    def to(self, device: torch.device) -> "Work":
        """The same on a device."""
        task, segment, order_T = (
            tensor.to(device, non_blocking=True) for tensor in (self.task, self.segment, self.order_T)
        )
        return Work(task, segment, order_T, self.rank, self.rows, self.ranks)


def padded(table: torch.Tensor, count: int) -> torch.Tensor:
    """Tasks with so many more of no rows that there are `count`."""
    filled = table.new_zeros(count, table.shape[1])
    filled[: len(table)] = table
    return filled
