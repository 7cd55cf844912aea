"""Which rows of a pass share an adapter, and what grouped kernels have to do for them; made on the host.

Shapes: T rows of a pass, G tiles, F rows of a tile, N adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serving.mix import AdapterBatch
from serving.packed import Needs

# Rows of a tile: when decoding, by how many share an adapter, and over prompts.
ONE = 1
FEW = 8
SOME = 16
MANY = 64
FEWEST_RANKS = 16  # that tensor cores take
NOBODY = -1  # the row that fills up a tile, and the tile that fills up a list
RankOf = Callable[[Needs], int]
WorkSize = tuple[int, int, int, int]  # tasks, segments, the largest rank, ranks of a task


@dataclass
class Tiles:
    """All rows of a pass, in tiles of rows that share an adapter: the adapter's index of each tile, and its rows."""

    adapter_G: Tensor
    row_GF: Tensor

    @classmethod
    def of(cls, adapter_T: Tensor, rows: int) -> "Tiles":
        """Tiles of so many rows, for a pass whose rows have these adapters."""
        order_T = adapter_T.argsort(stable=True)
        sorted_T = adapter_T[order_T]
        adapter_N, count_N = sorted_T.unique_consecutive(return_counts=True)
        tiles_N = divided(count_N, rows)
        adapter_G = adapter_N.repeat_interleave(tiles_N)
        missing_N = tiles_N * rows - count_N  # rows of an adapter's last tile
        shift_N = sum_before(missing_N)
        shift_T = shift_N.repeat_interleave(count_N)
        position_T = torch.arange(len(adapter_T))
        place_T = position_T + shift_T
        size = (len(adapter_G), rows)
        row_GF = torch.full(size, NOBODY, dtype=torch.int32)
        flat = row_GF.view(-1)
        flat[place_T] = order_T.int()
        return cls(adapter_G.int(), row_GF)

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.adapter_G)

    @property
    def rows(self) -> int:
        """The rows of a tile."""
        return self.row_GF.shape[1]

    def to(self, device: torch.device) -> "Tiles":
        """The same on a device."""
        adapter_G = moved(self.adapter_G, device)
        row_GF = moved(self.row_GF, device)
        return Tiles(adapter_G, row_GF)

    def enlarged(self) -> "Tiles":
        """As many tiles as the next power of two, of which those behind are the base's and have no rows."""
        count = power_of_2(self.count)
        adapter_G = padded(self.adapter_G, count, 0)
        row_GF = padded(self.row_GF, count, NOBODY)
        return Tiles(adapter_G, row_GF)

    def fill(self, other: "Tiles") -> None:
        """Copy as many other tiles into a graph's."""
        self.adapter_G.copy_(other.adapter_G)
        self.row_GF.copy_(other.row_GF)


@dataclass
class Work:
    """Ranks to compute: tasks [n, 2] of a tile and the first of some ranks, and segments, the tiles with any rank."""

    task: Tensor
    segment: Tensor
    rank: int  # the largest
    ranks: int  # of a task

    @classmethod
    def of(cls, tiles: Tiles, adapters: AdapterBatch, rank_of: RankOf) -> "Work | None":
        """The work for the adapters that have a rank at all; None where there is none."""
        rank_G = ranks_of_tiles(tiles, adapters, rank_of)
        largest = int(rank_G.max())
        if largest == 0:
            return None
        share = ranks_of_task(largest, tiles.rows)
        segment = rank_G.nonzero().flatten()
        tasks = divided(rank_G[segment], share)
        tile = segment.repeat_interleave(tasks)
        number = torch.arange(len(tile))
        first_number = sum_before(tasks)
        number -= first_number.repeat_interleave(tasks)
        first_rank = number * share
        task = torch.stack([tile, first_rank], dim=1)
        return cls(task.int(), segment.int(), largest, share)

    def to(self, device: torch.device) -> "Work":
        """The same on a device."""
        task = moved(self.task, device)
        segment = moved(self.segment, device)
        return replace(self, task=task, segment=segment)

    def enlarged(self) -> "Work":
        """As many tasks and segments as the next power of two, of which those behind are nobody's."""
        tasks = power_of_2(self.tasks)
        segments = power_of_2(self.segments)
        task = padded(self.task, tasks, NOBODY)
        segment = padded(self.segment, segments, NOBODY)
        return replace(self, task=task, segment=segment)

    def fill(self, other: "Work") -> None:
        """Copy as much other work into a graph's."""
        self.task.copy_(other.task)
        self.segment.copy_(other.segment)

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return len(self.task)

    @property
    def segments(self) -> int:
        """The number of segments."""
        return len(self.segment)

    @property
    def size(self) -> WorkSize:
        """What a graph's kernels are launched for."""
        tasks = self.tasks
        segments = self.segments
        return tasks, segments, self.rank, self.ranks


@dataclass
class Grouping:
    """The rows of a pass in tiles, and the work of grouped kernels: for linear layers, and for bottlenecks behind."""

    tiles: Tiles
    before: Work | None
    behind: Work | None

    @classmethod
    def of(cls, adapters: AdapterBatch, rows: int, rank_of: RankOf) -> "Grouping":
        """The grouping of a pass in tiles of so many rows, of whose adapters grouped kernels compute these ranks."""

        def rank_behind(needs: Needs) -> int:
            return needs.behind

        tiles = Tiles.of(adapters.adapter_T, rows)
        before = Work.of(tiles, adapters, rank_of)
        behind = Work.of(tiles, adapters, rank_behind)
        return cls(tiles, before, behind)

    def to(self, device: torch.device) -> "Grouping":
        """The same on a device."""
        tiles = self.tiles.to(device)
        before = self.before
        behind = self.behind
        if before is not None:
            before = before.to(device)
        if behind is not None:
            behind = behind.to(device)
        return Grouping(tiles, before, behind)

    def enlarged(self) -> "Grouping":
        """The same with as many tiles, tasks and segments as a graph has for it."""
        tiles = self.tiles.enlarged()
        before = self.before
        behind = self.behind
        if before is not None:
            before = before.enlarged()
        if behind is not None:
            behind = behind.enlarged()
        return Grouping(tiles, before, behind)

    def fill(self, other: "Grouping") -> None:
        """Copy another grouping of the same size into a graph's."""
        self.tiles.fill(other.tiles)
        if self.before is not None:
            assert other.before is not None
            self.before.fill(other.before)
        if self.behind is not None:
            assert other.behind is not None
            self.behind.fill(other.behind)

    @property
    def size(self) -> tuple[Any, ...]:
        """What a graph's kernels are launched for."""
        before: WorkSize | None = None
        behind: WorkSize | None = None
        if self.before is not None:
            before = self.before.size
        if self.behind is not None:
            behind = self.behind.size
        return self.tiles.count, self.tiles.rows, before, behind


def ranks_of_tiles(tiles: Tiles, adapters: AdapterBatch, rank_of: RankOf) -> Tensor:
    """The rank of each tile's adapter; 0 where it is the base."""
    ranks: dict[int, int] = {}
    for resident, _ in adapters.members:
        index = resident.index
        ranks[index] = rank_of(resident.needs)
    rank_of_tile: list[int] = []
    for index in tiles.adapter_G.tolist():
        rank = ranks.get(index, 0)
        rank_of_tile.append(rank)
    return torch.tensor(rank_of_tile)


def ranks_of_task(largest: int, rows: int) -> int:
    """How many ranks a task has at most, where the largest rank is this and a tile has so many rows."""
    if largest <= FEWEST_RANKS:
        return FEWEST_RANKS
    if rows < MANY or largest <= 32:
        return 32
    return 64


def inputs_of_share(inputs: int, shares: int, step: int) -> int:
    """How many inputs each of some programs sums, in whole steps: none is summed by two of them."""
    inputs_of_steps = shares * step
    steps = -(-inputs // inputs_of_steps)
    return steps * step


def rows_of_tile(adapters: AdapterBatch) -> int:
    """How many rows a tile of a decoding step has at most."""
    counts = [len(row_T) for _, row_T in adapters.members]
    most = max(counts, default=FEW)
    for rows in (ONE, FEW):
        if most <= rows:
            return rows
    return SOME


def products_of_row(needs: Needs) -> int:
    """How many products with the factors of its narrow adapter kernels take for a row."""
    ranks = power_of_2(needs.narrow)
    return max(FEWEST_RANKS, ranks)


def moved(table: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting."""
    return table.to(device, non_blocking=True)


def padded(table: Tensor, count: int, value: int) -> Tensor:
    """A table with so many more rows of a value that there are `count`."""
    size = (count, *table.shape[1:])
    filled = table.new_full(size, value)
    filled[: len(table)] = table
    return filled


def divided(number_N: Tensor, size: int) -> Tensor:
    """Into how many parts of at most this size each number is divided."""
    last = size - 1
    return (number_N + last) // size


def sum_before(number_N: Tensor) -> Tensor:
    """The sum of all numbers before each one."""
    sum_N = number_N.cumsum(0)
    return sum_N - number_N


def power_of_2(number: int) -> int:
    """The next power of two from a number above 0 on."""
    bits = (number - 1).bit_length()
    return 1 << bits
