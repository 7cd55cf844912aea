"""Adapters by name: all of them on the host, those in use on the device, each at an index.

An adapter's identity is its digest. A name leads to a digest when a request is made, and never later, so a name that
was loaded anew can serve neither the old weights nor keys and values that the old ones made.
Shapes: K indices, L decoder layers, S submodules, C columns.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from serving.arena import Arena
from serving.base import FrozenBase
from serving.error import AdapterRefused, UnknownAdapter
from serving.format import read_adapter
from serving.packed import NOWHERE, UNIT, Column, Needs, Packed, empty_table, pack

Entries = list[dict[str, Tensor]]  # by layer and submodule
OFFSETS = slice(Column.A, Column.BETA + 1)  # the table's columns that are offsets of tensors


@dataclass
class Resident:
    """An adapter on the device, by its index in the table; index 0 is the base's."""

    index: int
    packed: Packed
    start: int  # of its block in the arena
    users: int = 0
    ready: bool = False  # what it needs beside its block is there
    gone: bool = False  # it was evicted
    pages: list[int] = field(default_factory=list)  # keys and values in front of its documents
    rotation: int = 0  # which rotary positions it has
    embed_VD: Tensor | None = None
    head_VD: Tensor | None = None

    @property
    def digest(self) -> str:
        """The sha256 that the adapter is known by."""
        return self.packed.digest

    @property
    def needs(self) -> Needs:
        """What the adapter asks of a forward pass."""
        return self.packed.needs

    @property
    def has_vocabulary(self) -> bool:
        """Whether the adapter has an embedding or a head of its own."""
        has_embedding = self.embed_VD is not None
        return has_embedding or self.head_VD is not None


class Pool:
    """Loads, finds, places and evicts adapters."""

    def __init__(self, base: FrozenBase, residents: int, arena_bytes: int) -> None:
        """Have at most so many adapters at once on the device, and so many bytes of their weights."""
        self.base = base
        dtype = base.dtype
        unit_bytes = UNIT * dtype.itemsize
        units = arena_bytes // unit_bytes
        self.arena = Arena(units, dtype, base.device)
        tables = residents + 1  # the base's too
        empty_LSC = empty_table(base)
        host_KLSC = empty_LSC.repeat(tables, 1, 1, 1)
        self.table_KLSC = host_KLSC.to(base.device)
        if base.on_gpu:
            host_KLSC = host_KLSC.pin_memory()
        self.host_KLSC = host_KLSC
        self.adapter_stride = self.table_KLSC.stride(0)  # numbers of the table from one adapter to the next
        table_LSC = self.table_KLSC[0]
        self._entries = entries_of(table_LSC, base)
        self._names: dict[str, Packed] = {}
        self._pinned: set[str] = set()  # names
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # by digest, the longest unused first
        indices = range(1, residents + 1)
        self._free = list(reversed(indices))

    @property
    def names(self) -> list[str]:
        """The names that are loaded."""
        return sorted(self._names)

    @property
    def resident(self) -> set[str]:
        """The digests of the adapters on the device."""
        return set(self._residents)

    def entry(self, layer: int, submodule: str) -> Tensor:
        """The table on the device from the entry of a submodule on, at the first index."""
        entries = self._entries[layer]
        return entries[submodule]

    def prepare(self, folder: Path | str) -> Packed:
        """An adapter from its folder, on the host; raises AdapterRefused where it cannot be computed exactly."""
        packed = packed_adapter(folder, self.base)
        capacity = self.arena.size
        if packed.size > capacity:
            raise AdapterRefused(f"{folder}: found an adapter of {packed.size} numbers; allowed: {capacity}")
        return packed

    def give(self, name: str, packed: Packed, pinned: bool = False) -> None:
        """Let a name mean this adapter from now on; a `pinned` one is never evicted."""
        self._names[name] = packed
        if pinned:
            self._pinned.add(name)
        else:
            self._pinned.discard(name)

    def unload(self, name: str) -> None:
        """Forget a name; requests that were made with it are answered still."""
        self.packed_of(name)
        del self._names[name]
        self._pinned.discard(name)

    def packed_of(self, name: str) -> Packed:
        """The adapter of a name; raises UnknownAdapter."""
        packed = self._names.get(name)
        if packed is None:
            known = ", ".join(self.names) or "none"
            raise UnknownAdapter(f"adapter: found {name!r}, which is not loaded; allowed: {known}")
        return packed

    def acquire(self, packed: Packed) -> Resident | None:
        """The adapter on the device, for one more user; None where no index or no space in the arena is free now."""
        digest = packed.digest
        resident = self._residents.get(digest)
        if resident is None:
            resident = self._place(packed)
        if resident is None:
            return None
        resident.users += 1
        self._residents.move_to_end(digest)
        return resident

    def release(self, resident: Resident) -> None:
        """Say that a sequence has done with an adapter, which may be evicted when nobody uses it."""
        resident.users -= 1

    def evictable(self, with_pages: bool = False) -> Resident | None:
        """The resident (of those with pages, if need be) that was not used for the longest time and may go."""
        pinned: set[str] = set()
        for name in self._pinned:
            packed = self._names[name]
            pinned.add(packed.digest)
        for digest, resident in self._residents.items():
            if resident.users > 0:
                continue
            if digest in pinned:
                continue
            if with_pages and not resident.pages:
                continue
            return resident
        return None

    def evict(self, resident: Resident) -> None:
        """Free an adapter's index and memory; its pages are the caller's to free."""
        units = resident.packed.units
        del self._residents[resident.digest]
        resident.gone = True
        self.arena.free(resident.start, units)
        self._free.append(resident.index)

    def _place(self, packed: Packed) -> Resident | None:
        """Copy an adapter to the device; None where no index or no space is free."""
        if not self._free:
            return None
        start = self.arena.reserve(packed.units)
        if start is None:
            return None
        index = self._free.pop()
        block = packed.block
        first = start * UNIT
        end = first + len(block)
        place = self.arena.data[first:end]
        place.copy_(block, non_blocking=True)
        self._write_table(index, packed, start)
        digest = packed.digest
        resident = Resident(index, packed, start)
        self._residents[digest] = resident
        return resident

    def _write_table(self, index: int, packed: Packed, start: int) -> None:
        """Fill an adapter's table, whose offsets count from the arena's begin, not from the block's."""
        table_LSC = self.host_KLSC[index]
        table_LSC.copy_(packed.table_LSC)
        offsets = table_LSC[..., OFFSETS]
        is_there = offsets != NOWHERE
        offsets += is_there * start
        self.upload(index)

    def upload(self, index: int) -> None:
        """Copy an adapter's table from the host to the device."""
        host_LSC = self.host_KLSC[index]
        table_LSC = self.table_KLSC[index]
        table_LSC.copy_(host_LSC, non_blocking=True)


def packed_adapter(folder: Path | str, base: FrozenBase) -> Packed:
    """An adapter from its folder, as it is copied to the device; raises AdapterRefused."""
    adapter = read_adapter(folder, base)
    return pack(adapter, base)


def entries_of(table_LSC: Tensor, base: FrozenBase) -> Entries:
    """The entries of an adapter's table by layer and submodule, made once: many launches of a pass take them."""
    entries: Entries = []
    for table_SC in table_LSC:
        by_name: dict[str, Tensor] = {}
        for submodule, number in base.submodules.items():
            by_name[submodule] = table_SC[number]
        entries.append(by_name)
    return entries
