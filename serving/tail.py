"""Which narrow adapters have their A behind the base's weights, where the base's own product computes them too.

A place is a range of ranks, the same in every layer; a group of several linear layers has as many rows for each rank.
Shapes: L decoder layers, S submodules, C columns, N adapters.
"""

import torch
from torch import Tensor

from serving.base import FrozenBase
from serving.group import Group
from serving.kernel.tail import tail_kernel
from serving.packed import Column
from serving.pool import Pool, Resident

INPUTS_OF_STEP = 1024
Placed = tuple[Resident, int]  # with the first rank


class Tail:
    """The adapters of the current batch, one behind the other from the first rank on."""

    def __init__(self, base: FrozenBase, pool: Pool, capacity: int) -> None:
        """Use so many ranks behind the base's weights."""
        self.base = base
        self.pool = pool
        self.capacity = capacity
        self._placed: dict[int, Placed] = {}  # by index

    def place(self, residents: list[Resident]) -> int:
        """Make these adapters' factors lie there; how many ranks a pass must compute, or 0 where they do not fit."""
        narrow: list[Resident] = []
        ranks = 0
        for resident in residents:
            rank = resident.needs.narrow
            ranks += rank
            if rank:
                narrow.append(resident)
        needed = rounded_ranks(ranks)
        if needed > self.capacity or not narrow:
            return 0
        for resident in narrow:
            if not self._is_within(resident, needed):
                self._place_anew(narrow)
                break
        return needed

    def _is_within(self, resident: Resident, end: int) -> bool:
        """Whether an adapter's factors lie in the first ranks, up to `end`."""
        placed = self._placed.get(resident.index)
        if placed is None:
            return False
        holder, start = placed
        if holder is not resident:
            return False
        stop = start + resident.needs.narrow
        return stop <= end

    def _place_anew(self, residents: list[Resident]) -> None:
        """Lay these adapters' factors from the first rank on, and forget all others."""
        self._placed = {}
        indices: list[int] = []
        start = 0
        for resident in residents:
            self._placed[resident.index] = resident, start
            self._note(resident.index, start)
            indices.append(resident.index)
            start += resident.needs.narrow
        device = self.base.device
        adapter_N = torch.tensor(indices, dtype=torch.int32, device=device)
        for group in self.base.groups.values():
            self._copy_factors(group, adapter_N)

    def _note(self, index: int, start: int) -> None:
        """Write into an adapter's table at which row of each group the factors of each linear layer begin."""
        table_LSC = self.pool.host_KLSC[index]
        for group in self.base.groups.values():
            first = group.sections * start
            for section, linear_layer in enumerate(group.linears):
                number = self.base.submodules[linear_layer.name]
                columns_LC = table_LSC[:, number]
                ranks_L = columns_LC[:, Column.RANKS]
                offset_L = section * ranks_L
                columns_LC[:, Column.TAIL] = first + offset_L
        self.pool.upload(index)

    def _copy_factors(self, group: Group, adapter_N: Tensor) -> None:
        """Copy the factors of some adapters behind the weights of a group."""
        weight = group.weight_LNI
        layers, _, inputs = weight.shape
        table = self.pool.table_KLSC
        entry = self.pool.entry(0, group.first_linear)
        rows = len(adapter_N) * group.sections
        grid = (rows, layers)
        tail_kernel[grid](
            weight,
            adapter_N,
            entry,
            self.pool.arena.data,
            group.outputs,
            inputs,
            group.sections,
            weight.stride(0),
            table.stride(0),
            table.stride(1),
            N=INPUTS_OF_STEP,
            num_warps=4,
        )


def rounded_ranks(ranks: int) -> int:
    """The next number of ranks for which there is a graph: 16, 32, and then 2 or 3 times a power of two."""
    step = 16
    while step * 4 < ranks:
        step *= 2
    steps = -(-ranks // step)
    return steps * step
