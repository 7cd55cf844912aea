"""Rows in tiles that share an adapter, and the ranks that grouped kernels compute of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.grouping import NOBODY, Tiles, Work, inputs_of_share
from serving.packed import Needs


def test_every_row_is_in_one_tile_of_its_adapter() -> None:
    adapter_T = torch.tensor([3, 0, 3, 0, 0, 7, 3, 0, 0], dtype=torch.int32)
    tiles = Tiles.of(adapter_T, 2)
    rows = [row for row in tiles.row_GF.flatten().tolist() if row != NOBODY]
    assert sorted(rows) == list(range(9))
    for adapter, row_F in zip(tiles.adapter_G.tolist(), tiles.row_GF, strict=True):
        assert {int(adapter_T[row]) for row in row_F.tolist() if row != NOBODY} == {adapter}
    assert tiles.adapter_G.tolist() == [0, 0, 0, 3, 3, 7]
    larger = tiles.enlarged()
    assert larger.count == 8 and set(larger.row_GF[6:].flatten().tolist()) == {NOBODY}


def test_tasks_cover_the_ranks_of_each_tile() -> None:
    members: Any = [
        (SimpleNamespace(index=index, needs=Needs(wide=rank)), None) for index, rank in ((3, 40), (7, 70))
    ]
    adapters: Any = SimpleNamespace(members=members)
    tiles = Tiles.of(torch.tensor([3, 0, 7, 3, 3], dtype=torch.int32), 2)
    work = Work.of(tiles, adapters, lambda needs: needs.wide)
    assert work is not None and (work.rank, work.ranks) == (70, 32)
    assert work.segment.tolist() == [1, 2, 3]  # tile 0 is the base's
    assert work.task.tolist() == [[1, 0], [1, 32], [2, 0], [2, 32], [3, 0], [3, 32], [3, 64]]
    assert Work.of(tiles, adapters, lambda needs: needs.narrow) is None


@pytest.mark.parametrize("inputs", [64, 2048, 8192, 11008, 14336])
def test_shares_count_each_input_once(inputs: int) -> None:
    step, shares = 128, max(1, inputs // 2048)
    size = inputs_of_share(inputs, shares, step)
    counted = torch.zeros(inputs)
    for first in range(0, shares * size, size):
        for start in range(first, min(first + size, inputs), step):
            counted[start : start + step] += 1
    assert counted.tolist() == [1] * inputs
