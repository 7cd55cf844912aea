"""Adapters by name: all of them on the host, those in use in slots on the device.

An adapter's identity is its digest. A name leads to a digest when a request is made, and never later, so a name that
was loaded anew can serve neither the old weights nor keys and values that the old ones made.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from serving.base import Base
from serving.error import AdapterRefused, UnknownAdapter
from serving.format import read
from serving.packed import BETA, NOWHERE, UNIT, A, Packed, empty, pack

PIECES = slice(A, BETA + 1)  # the table's columns that are offsets


@dataclass
class Resident:
    """An adapter in a slot of the device; slot 0 is the base's."""

    slot: int
    packed: Packed
    start: int  # of its block in the arena
    users: int = 0
    ready: bool = False  # what it needs beside its block is there
    gone: bool = False  # it was evicted
    pages: list[int] = field(default_factory=list)  # keys and values in front of its documents
    rotation: int = 0  # which rotary positions it has
    embed_VD: torch.Tensor | None = None
    head_VD: torch.Tensor | None = None


class Arena:
    """One tensor on the device in which blocks lie; a block takes the first gap that is large enough."""

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for so many units of UNIT elements."""
        self.data = torch.zeros(units * UNIT, dtype=dtype, device=device)
        self._gaps = [(0, units)]  # start, stop; sorted

    def reserve(self, units: int) -> int | None:
        """Where a block of this size may lie, or None."""
        for number, (start, stop) in enumerate(self._gaps):
            if stop - start >= units:
                self._gaps[number] = (start + units, stop)
                return start
        return None

    def give_back(self, start: int, units: int) -> None:
        """Make a block a gap, joined with its neighbours."""
        joined: list[tuple[int, int]] = []
        for gap in sorted([*self._gaps, (start, start + units)]):
            if joined and joined[-1][1] == gap[0]:
                joined[-1] = (joined[-1][0], gap[1])
            elif gap[0] < gap[1]:
                joined.append(gap)
        self._gaps = joined or [(0, 0)]


class Pool:
    """Loads, finds, places and evicts adapters."""

    def __init__(self, base: Base, slots: int, arena_bytes: int) -> None:
        """Room for so many adapters at once on the device, and so many bytes of their weights."""
        self.base = base
        units = arena_bytes // (UNIT * base.dtype.itemsize)
        self.arena = Arena(units, base.dtype, base.device)
        table = empty(base)[None].repeat(slots + 1, 1, 1, 1)
        self.table_KLSC = table.to(base.device)
        self.host_KLSC = table.pin_memory() if base.device.type == "cuda" else table
        self._names: dict[str, Packed] = {}
        self._pinned: set[str] = set()  # names
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # by digest, the longest unused first
        self._slots = list(range(slots, 0, -1))

    @property
    def names(self) -> list[str]:
        """The names that are loaded."""
        return sorted(self._names)

    @property
    def resident(self) -> set[str]:
        """The digests that are in slots."""
        return set(self._residents)

    def prepare(self, folder: Path | str) -> Packed:
        """An adapter from its folder, on the host; raises AdapterRefused where it cannot be computed exactly."""
        packed = pack(read(folder, self.base), self.base)
        if packed.units > len(self.arena.data) // UNIT:
            found, allowed = packed.units * UNIT, len(self.arena.data)
            raise AdapterRefused(f"{folder}: found an adapter of {found} numbers; allowed: {allowed}")
        return packed

    def give(self, name: str, packed: Packed, pinned: bool = False) -> None:
        """Let a name mean this adapter from now on; a `pinned` one is never evicted from its slot."""
        self._names[name] = packed
        (self._pinned.add if pinned else self._pinned.discard)(name)

    def unload(self, name: str) -> None:
        """Forget a name; requests that were made with it are answered still."""
        self.find(name)
        del self._names[name]
        self._pinned.discard(name)

    def find(self, name: str) -> Packed:
        """The adapter of a name; raises UnknownAdapter."""
        if name not in self._names:
            known = ", ".join(self.names) or "none"
            raise UnknownAdapter(f"adapter: found {name!r}, which is not loaded; allowed: {known}")
        return self._names[name]

    def acquire(self, packed: Packed) -> Resident | None:
        """The adapter in a slot, for one more user; None where no room can be made now."""
        resident = self._residents.get(packed.digest) or self._place(packed)
        if resident is not None:
            resident.users += 1
            self._residents.move_to_end(packed.digest)
        return resident

    def release(self, resident: Resident) -> None:
        """Say that a sequence has done with an adapter, which may be evicted when nobody uses it."""
        resident.users -= 1

    def idle(self, with_pages: bool = False) -> Resident | None:
        """The resident (of those with pages, if need be) that was not used for the longest time and may go."""
        kept = {self._names[name].digest for name in self._pinned}
        free = (
            resident
            for digest, resident in self._residents.items()
            if resident.users == 0 and digest not in kept and (resident.pages or not with_pages)
        )
        return next(free, None)

    def evict(self, resident: Resident) -> None:
        """Free a slot; its pages are the caller's to give back."""
        del self._residents[resident.packed.digest]
        resident.gone = True
        self.arena.give_back(resident.start, resident.packed.units)
        self._slots.append(resident.slot)

    def _place(self, packed: Packed) -> Resident | None:
        if not self._slots or (start := self.arena.reserve(packed.units)) is None:
            return None
        slot = self._slots.pop()
        end = (start + packed.units) * UNIT
        self.arena.data[start * UNIT : end].copy_(packed.block, non_blocking=True)
        table_LSC = self.host_KLSC[slot]
        table_LSC.copy_(packed.table_LSC)
        pieces = table_LSC[..., PIECES]
        pieces += (pieces != NOWHERE) * start
        self.table_KLSC[slot].copy_(table_LSC, non_blocking=True)
        resident = Resident(slot, packed, start)
        self._residents[packed.digest] = resident
        return resident
