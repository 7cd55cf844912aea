"""An adapter as one block of memory and a table of where its tensors lie, so that loading it is one copy.

The table has a row of numbers for each submodule of each decoder layer. Offsets count units of UNIT elements.
Shapes: L decoder layers, S submodules, C columns.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from serving.adapter import ACTIVATION_NAMES, Adapter, Part
from serving.base import BEHIND, HEAD_NORMS, LAST_NORM, NORMS, FrozenBase

UNIT = 8  # elements: 16 bytes in 16 bits, so that kernels may load four words at once
NARROW = 64  # ranks up to which decoding takes the factors from behind the base's weights
NOWHERE = -1  # the offset of a tensor that is not there
NORM_NAMES = (*NORMS, *HEAD_NORMS, LAST_NORM)


class Column(IntEnum):
    """What an entry of the table says; A to BETA are offsets of tensors."""

    RANK = 0
    A = 1
    B = 2
    C = 3
    V = 4
    M = 5
    U = 6
    BIAS = 7
    BETA = 8
    ACTIVATION = 9
    TAIL = 10
    RANKS = 11


FIELDS = {  # the column of a tensor, and the field of a part that it holds
    Column.A: "a_RI",
    Column.B: "b_RO",
    Column.C: "c_R",
    Column.V: "v_O",
    Column.M: "m_O",
    Column.U: "u_I",
    Column.BIAS: "bias_R",
    Column.BETA: "beta_O",
}


@dataclass(frozen=True)
class Needs:
    """What a forward pass must do for an adapter, or for all adapters of a batch."""

    narrow: int = 0  # the largest rank whose factors stand behind the base's weights
    wide: int = 0  # the largest rank that does not
    behind: int = 0  # the largest size of a bottleneck
    gains: bool = False
    scales: bool = False
    norms: bool = False

    @property
    def is_narrow(self) -> bool:
        """Whether there are narrow adapters, and no wide ones."""
        has_narrow = self.narrow > 0
        return has_narrow and self.wide == 0

    def __or__(self, other: "Needs") -> "Needs":
        """The needs of a batch that has both: the larger ranks, and every part that either has."""
        return Needs(
            narrow=max(self.narrow, other.narrow),
            wide=max(self.wide, other.wide),
            behind=max(self.behind, other.behind),
            gains=self.gains or other.gains,
            scales=self.scales or other.scales,
            norms=self.norms or other.norms,
        )


@dataclass(frozen=True)
class Packed:
    """An adapter on the host, ready to be copied: pinned where there is a GPU."""

    adapter: Adapter  # without its parts
    block: Tensor
    table_LSC: Tensor
    needs: Needs

    @property
    def digest(self) -> str:
        """The sha256 that the adapter is known by, of its weights and config."""
        return self.adapter.digest

    @property
    def size(self) -> int:
        """The numbers of its block."""
        return len(self.block)

    @property
    def units(self) -> int:
        """The units of its block."""
        return self.size // UNIT


class Block:
    """An adapter's tensors, one behind the other; a tensor that several parts share is laid once."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._starts: dict[int, int] = {}  # by the id of the tensor
        self._units = 0

    def place(self, tensor: Tensor) -> int:
        """The unit that a tensor begins at; a new one is laid behind the others."""
        key = id(tensor)
        if key not in self._starts:
            self._starts[key] = self._units
            self._tensors.append(tensor)
            self._units += units_for(tensor)
        return self._starts[key]

    def on_host(self, base: FrozenBase) -> Tensor:
        """All tensors in the base's type, in one block on the host."""
        size = self._units * UNIT
        block = torch.zeros(size, dtype=base.dtype, pin_memory=base.on_gpu)
        for tensor in self._tensors:
            key = id(tensor)
            start = self._starts[key] * UNIT
            stop = start + tensor.numel()
            place = block[start:stop]
            place = place.view(tensor.shape)
            place.copy_(tensor)
        return block


def pack(adapter: Adapter, base: FrozenBase) -> Packed:
    """Lay an adapter's tensors one behind the other, in the base's type; tensors that parts share are laid once."""
    block = Block()
    table_LSC = empty_table(base)
    for place, part in adapter.parts.items():
        layer, name = place
        submodule = base.submodules[name]
        row_C = table_LSC[layer, submodule]
        fill_row(row_C, part, block)
    needs = needs_of(adapter)
    table_LSC[..., Column.RANKS] = needs.narrow
    data = block.on_host(base)
    bare = without_parts(adapter, base)
    return Packed(bare, data, table_LSC, needs)


def empty_table(base: FrozenBase) -> Tensor:
    """The table [L, S, C] of no adapter."""
    submodules = len(base.submodules)
    size = (base.shape.layers, submodules, len(Column))
    table_LSC = torch.full(size, NOWHERE, dtype=torch.int32)
    for column in (Column.RANK, Column.ACTIVATION, Column.RANKS):
        table_LSC[..., column] = 0
    return table_LSC


def fill_row(row_C: Tensor, part: Part, block: Block) -> None:
    """Write into an entry of the table what a part has, and lay its tensors in the block."""
    row_C[Column.RANK] = part.rank
    row_C[Column.ACTIVATION] = ACTIVATION_NAMES.index(part.activation)
    for column, field in FIELDS.items():
        tensor = getattr(part, field)
        if tensor is not None:
            row_C[column] = block.place(tensor)


def units_for(tensor: Tensor) -> int:
    """The number of units that a tensor takes, of which the last one may have space left."""
    elements = tensor.numel()
    return -(-elements // UNIT)


def needs_of(adapter: Adapter) -> Needs:
    """What an adapter's parts ask of a forward pass."""
    needs = Needs()
    linears: list[Part] = []
    for (_, name), part in adapter.parts.items():
        if name in NORM_NAMES:
            needs |= Needs(norms=True)
        elif name.endswith(BEHIND):
            needs |= Needs(behind=part.rank)
        else:
            linears.append(part)
    rank = 0
    is_plain = True
    for part in linears:
        rank = max(rank, part.rank)
        if part.c_R is not None:
            is_plain = False
        if part.v_O is not None:
            is_plain = False
        needs |= Needs(gains=part.has_gain, scales=part.has_scale)
    if is_plain and rank <= NARROW:
        return replace(needs, narrow=rank)
    return replace(needs, wide=rank)


def without_parts(adapter: Adapter, base: FrozenBase) -> Adapter:
    """An adapter without its parts, whose other tensors are in the base's type."""
    changed: dict[str, Any] = {"parts": {}}
    for field in ("prefix_L2VHE", "prompt_VD", "embed_VD", "head_VD"):
        tensor = getattr(adapter, field)
        if tensor is not None:
            changed[field] = on_host(tensor, base)
    return replace(adapter, **changed)


def on_host(tensor: Tensor, base: FrozenBase) -> Tensor:
    """A copy of a tensor in the base's type, pinned where the base is on a GPU."""
    tensor = tensor.to(base.dtype, copy=True)
    if base.on_gpu:
        return tensor.pin_memory()
    return tensor
