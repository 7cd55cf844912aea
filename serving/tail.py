"""Which narrow adapters have their A behind the base's weights, where the base's own product computes them too.

A place is a range of ranks, the same in every layer; a group of several linear layers has as many rows for each rank.
"""

import torch

from serving.base import Base
from serving.kernel.tail import tail_kernel
from serving.packed import COLUMNS, RANKS, TAIL
from serving.pool import Pool, Resident


class Tail:
    """The adapters of the current batch, one behind the other from the first rank on."""

    def __init__(self, base: Base, pool: Pool, capacity: int) -> None:
        """Room for so many ranks."""
        self.base, self.pool, self.capacity = base, pool, capacity
        self._placed: dict[int, tuple[Resident, int]] = {}  # by slot, with the first rank

    def place(self, residents: list[Resident]) -> int:
        """Make these adapters' factors lie there; how many ranks a pass must compute, or 0 where they do not fit."""
        narrow = [r for r in residents if r.packed.needs.narrow]
        needed = rounded(sum(r.packed.needs.narrow for r in narrow))
        if needed > self.capacity or not narrow:
            return 0
        if not all(self._within(resident, needed) for resident in narrow):
            self._write(narrow)
        return needed

    def _within(self, resident: Resident, end: int) -> bool:
        holder, start = self._placed.get(resident.slot, (None, 0))
        return holder is resident and start + resident.packed.needs.narrow <= end

    def _write(self, residents: list[Resident]) -> None:
        self._placed, start = {}, 0
        for resident in residents:
            self._placed[resident.slot] = resident, start
            table_LSC = self.pool.host_KLSC[resident.slot]
            for group in self.base.groups.values():
                for number, site in enumerate(group.sites):
                    columns_LC = table_LSC[:, self.base.sites[site.name]]
                    columns_LC[:, TAIL] = len(group.sites) * start + number * columns_LC[:, RANKS]
            self.pool.table_KLSC[resident.slot].copy_(table_LSC, non_blocking=True)
            start += resident.packed.needs.narrow
        slot_N = torch.tensor([r.slot for r in residents], dtype=torch.int32, device=self.base.device)
        for group in self.base.groups.values():
            weight, table = group.weight_LNI, self.pool.table_KLSC
            tail_kernel[(len(residents) * len(group.sites), weight.shape[0])](
                weight, slot_N, table[0, 0, self.base.sites[group.sites[0].name]], self.pool.arena.data, group.out,
                weight.shape[2], weight.stride(0), table.stride(0), table.stride(1), len(COLUMNS), len(group.sites),
                N=1024, num_warps=4,
            )  # fmt: skip


def rounded(ranks: int) -> int:
    """The next number of ranks for which there is a graph: 16, 32, and then 2 or 3 times a power of two."""
    step = 16
    while step * 4 < ranks:
        step *= 2
    return -(-ranks // step) * step
