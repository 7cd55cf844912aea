"""An adapter as one block of memory and a table of where its pieces lie, so that loading it is one copy.

The table has a row of numbers for each site of each decoder layer. Offsets count pieces of UNIT elements.
Shapes: L decoder layers, S sites, C columns.
"""

from dataclasses import dataclass
from typing import Any

import torch

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
    block: torch.Tensor
    table_LSC: torch.Tensor
    needs: Needs

    @property
    def digest(self) -> str:
        """The sha256 that the adapter is known by, of its weights and config."""
        return self.adapter.digest

    @property
    def units(self) -> int:
        """The size of its block."""
        return len(self.block) // UNIT


def pack(adapter: Adapter, base: Base) -> Packed:
    """Lay an adapter's pieces one behind the other, in the base's type; pieces that parts share are laid once."""
    pieces, table_LSC, end = [], empty(base), 0
    known: dict[int, int] = {}
    for (layer, name), part in adapter.parts.items():
        row_C = table_LSC[layer, base.sites[name]]
        row_C[RANK], row_C[ACTIVATION] = part.rank, ACTIVATIONS.index(part.activation)
        for column, field in TENSORS:
            tensor = getattr(part, field)
            if tensor is None:
                continue
            if id(tensor) not in known:
                known[id(tensor)] = end
                pieces.append(tensor)
                end += -(-tensor.numel() // UNIT)
            row_C[column] = known[id(tensor)]
    block = torch.zeros(end * UNIT, dtype=base.dtype, pin_memory=base.device.type == "cuda")
    for piece in pieces:
        start = known[id(piece)] * UNIT
        block[start : start + piece.numel()].view(piece.shape).copy_(piece)
    bare = Adapter(adapter.digest, {}, *_extras(adapter, base))
    return Packed(bare, block, table_LSC, needs(adapter, table_LSC))


def empty(base: Base) -> torch.Tensor:
    """The table [L, S, C] of no adapter."""
    table_LSC = torch.full((base.shape.layers, len(base.sites), len(COLUMNS)), NOWHERE, dtype=torch.int32)
    table_LSC[..., RANK] = table_LSC[..., ACTIVATION] = table_LSC[..., RANKS] = 0
    return table_LSC


def needs(adapter: Adapter, table_LSC: torch.Tensor) -> Needs:
    """What an adapter's parts ask of a forward pass; notes in the table how many rows its factors take at most."""
    linear = {place: part for place, part in adapter.parts.items() if place[1] not in (*NORMS, *HEAD_NORMS, "norm")}
    before = [part for (_, name), part in linear.items() if not name.endswith(BEHIND)]
    rank = max((part.rank for part in before), default=0)
    narrow = rank <= NARROW and all(_plain(part) for part in before)
    table_LSC[..., RANKS] = rank if narrow else 0
    return Needs(
        narrow=rank if narrow else 0,
        wide=0 if narrow else rank,
        behind=max((part.rank for (_, name), part in linear.items() if name.endswith(BEHIND)), default=0),
        gains=any(part.m_O is not None or part.beta_O is not None for part in before),
        scales=any(part.u_I is not None for part in before),
        norms=len(linear) < len(adapter.parts),
    )


def _plain(part: Part) -> bool:
    return part.c_R is None and part.v_O is None


def _extras(adapter: Adapter, base: Base) -> list[Any]:
    tensors = (adapter.prefix_L2VHE, adapter.prompt_VD, adapter.embed_VD, adapter.head_VD)
    pin = base.device.type == "cuda"
    held = [None if t is None else t.to(base.dtype) for t in tensors]
    return [*(t.pin_memory() if pin and t is not None else t for t in held), adapter.config]
