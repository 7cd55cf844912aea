"""An adapter as one block of memory and a table of where its pieces lie, so that loading it is one copy.

The table has a row of numbers for each site of each decoder layer. Offsets count pieces of UNIT elements.
Shapes: L decoder layers, S sites, C columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.adapter import ACTIVATIONS, Adapter, Part
from serving.base import BEHIND, HEAD_NORMS, NORMS, Base

UNIT = 8  # elements: 16 bytes in 16 bits, so that kernels may load four words at once
NARROW = 64  # ranks up to which decoding takes the factors from behind the base's weights
COLUMNS = ("rank", "a", "b", "c", "v", "m", "u", "bias", "beta", "activation", "tail", "ranks")
RANK, A, B, C, V, M, U, BIAS, BETA, ACTIVATION, TAIL, RANKS = range(len(COLUMNS))
TENSORS = (
    (A, "a_RI"),
    (B, "b_RO"),
    (C, "c_R"),
    (V, "v_O"),
    (M, "m_O"),
    (U, "u_I"),
    (BIAS, "bias_R"),
    (BETA, "beta_O"),
)
NORM_SITES = (*NORMS, *HEAD_NORMS, "norm")
NOWHERE = -1


@dataclass(frozen=True)
class Needs:
    """What a forward pass must do for an adapter, or for all adapters of a batch."""

    narrow: int = 0  # the largest rank whose factors stand behind the base's weights
    wide: int = 0  # the largest rank that does not
    behind: int = 0  # the largest size of a bottleneck
    gains: bool = False
    scales: bool = False
    norms: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        """The needs of a batch that has both: the larger ranks, and every part that either has."""
        return Needs(
            max(self.narrow, other.narrow),
            max(self.wide, other.wide),
            max(self.behind, other.behind),
            self.gains or other.gains,
            self.scales or other.scales,
            self.norms or other.norms,
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
    def units(self) -> int:
        """The size of its block."""
        return len(self.block) // UNIT


class Pieces:
    """The tensors of a block, one behind the other; a tensor that several parts share is laid once."""

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
            self._units += -(-tensor.numel() // UNIT)
        return self._starts[key]

    def block(self, base: Base) -> Tensor:
        """All tensors in the base's type, in one block on the host."""
        block = torch.zeros(self._units * UNIT, dtype=base.dtype, pin_memory=base.on_gpu)
        for tensor in self._tensors:
            start = self._starts[id(tensor)] * UNIT
            stop = start + tensor.numel()
            block[start:stop].view(tensor.shape).copy_(tensor)
        return block


def pack(adapter: Adapter, base: Base) -> Packed:
    """Lay an adapter's pieces one behind the other, in the base's type; pieces that parts share are laid once."""
    pieces = Pieces()
    table_LSC = empty(base)
    for (layer, name), part in adapter.parts.items():
        row_C = table_LSC[layer, base.sites[name]]
        row_C[RANK] = part.rank
        row_C[ACTIVATION] = ACTIVATIONS.index(part.activation)
        for column, field in TENSORS:
            tensor = getattr(part, field)
            if tensor is not None:
                row_C[column] = pieces.place(tensor)
    block = pieces.block(base)
    bare = replace(
        adapter,
        parts={},
        prefix_L2VHE=_on_host(adapter.prefix_L2VHE, base),
        prompt_VD=_on_host(adapter.prompt_VD, base),
        embed_VD=_on_host(adapter.embed_VD, base),
        head_VD=_on_host(adapter.head_VD, base),
    )
    return Packed(bare, block, table_LSC, needs(adapter, table_LSC))


def empty(base: Base) -> Tensor:
    """The table [L, S, C] of no adapter."""
    size = (base.shape.layers, len(base.sites), len(COLUMNS))
    table_LSC = torch.full(size, NOWHERE, dtype=torch.int32)
    for column in (RANK, ACTIVATION, RANKS):
        table_LSC[..., column] = 0
    return table_LSC


def needs(adapter: Adapter, table_LSC: Tensor) -> Needs:
    """What an adapter's parts ask of a forward pass; notes in the table how many rows its factors take at most."""
    before: list[Part] = []  # linear layers
    behind = 0
    norms = False
    for (_, name), part in adapter.parts.items():
        if name in NORM_SITES:
            norms = True
        elif name.endswith(BEHIND):
            behind = max(behind, part.rank)
        else:
            before.append(part)
    gains = any(_has_gain(part) for part in before)
    scales = any(part.u_I is not None for part in before)
    common = Needs(behind=behind, gains=gains, scales=scales, norms=norms)
    rank = max((part.rank for part in before), default=0)
    if rank > NARROW or not all(_is_plain(part) for part in before):
        table_LSC[..., RANKS] = 0
        return replace(common, wide=rank)
    table_LSC[..., RANKS] = rank
    return replace(common, narrow=rank)


def _has_gain(part: Part) -> bool:
    return part.m_O is not None or part.beta_O is not None


def _is_plain(part: Part) -> bool:
    return part.c_R is None and part.v_O is None


def _on_host(tensor: Tensor | None, base: Base) -> Tensor | None:
    """A tensor in the base's type, pinned where the base is on a GPU."""
    if tensor is None:
        return None
    tensor = tensor.to(base.dtype)
    if base.on_gpu:
        return tensor.pin_memory()
    return tensor
