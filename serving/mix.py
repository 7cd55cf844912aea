"""Which adapters the rows of a forward pass have.

Shapes: T rows, N runs of rows that have one adapter.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from serving.integers import Integers, integers, tensor_of
from serving.packed import Needs
from serving.pool import Resident

Owner = Resident | None  # whose rows are: an adapter's, or the base's
Owners = Several[Owner]


class BatchAdapter(NamedTuple):
    """An adapter of a batch, and its rows."""

    resident: Resident
    row_T: Tensor


@dataclass
class AdapterBatch:
    """The adapters of one forward pass, and which rows have which."""

    adapter_T: Tensor  # the adapter of each row by its index, int32
    members: list[BatchAdapter] = field(default_factory=list)  # without the base
    needs: Needs = field(default_factory=Needs)

    @classmethod
    def of(cls, owners: Owners, counts: list[int] | None = None) -> "AdapterBatch":
        """The adapters of a batch whose runs of rows (`counts`, or one row each) have these owners; on the host."""
        if counts is None:
            counts = [1] * len(owners)
        members = members_of(owners, counts)
        needs = Needs()
        for member in members:
            needs |= member.resident.needs
        indices = [index_of(owner) for owner in owners]
        adapter_N = torch.tensor(indices, dtype=torch.int32)
        count_N = torch.tensor(counts)
        adapter_T = adapter_N.repeat_interleave(count_N)
        return cls(adapter_T, members, needs)

    def is_of(self, resident: Resident) -> Tensor:
        """Which rows are an adapter's, in a column."""
        is_own_T = self.adapter_T == resident.index
        return is_own_T[:, None]

    def to(self, device: torch.device) -> "AdapterBatch":
        """The same with the adapters' indices on a device."""
        adapter_T = self.adapter_T.to(device, non_blocking=True)
        return replace(self, adapter_T=adapter_T)


def index_of(owner: Owner) -> int:
    """The index of an adapter on the device; 0 for the base."""
    if owner is None:
        return 0
    return owner.index


def members_of(owners: Owners, counts: list[int]) -> list[BatchAdapter]:
    """The adapters of runs of rows, in the order of their indices, each with all its rows."""
    rows: dict[int, Integers] = {}
    residents: dict[int, Resident] = {}
    start = 0
    for owner, count in zip(owners, counts, strict=True):
        end = start + count
        if owner is not None:
            index = owner.index
            residents[index] = owner
            own_rows = rows.setdefault(index, integers())
            own_rows.extend(range(start, end))
        start = end
    members: list[BatchAdapter] = []
    for index in sorted(residents):
        resident = residents[index]
        row_T = tensor_of(rows[index])
        member = BatchAdapter(resident, row_T)
        members.append(member)
    return members
