"""Rows of many adapters in one forward pass: which row has which, and the equation of a linear layer, in plain torch.

    Y = M_s * ((U_s * X) W^T + V_s * ((((U_s * X) A_s^T) * C_s) B_s)) + beta_s

for the rows of slot s, with the parts that its adapter has. This is the reference that the GPU's kernels are compared
with, and what the CPU runs. Rows of one adapter are computed apart from the others', so company changes nothing.
Shapes: T rows, I inputs, O outputs, R rank, D width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from serving import packed
from serving.adapter import Place
from serving.base import BEHIND, Base, Group
from serving.packed import NOWHERE, RANK, UNIT, Needs
from serving.pool import Pool, Resident

FUNCTIONS = (lambda x: x, relu, gelu, silu)  # by number, as serving.adapter.ACTIVATIONS


class Tenant(NamedTuple):
    """An adapter of the batch, and its rows."""

    resident: Resident
    row_T: Tensor


@dataclass
class Mix:
    """The adapters of one forward pass."""

    slot_T: Tensor  # the slot of each row, int32, on the device
    tenants: list[Tenant] = field(default_factory=list)  # without the base
    needs: Needs = field(default_factory=Needs)

    @classmethod
    def of(cls, residents: list[Resident | None], device: torch.device, counts: list[int] | None = None) -> "Mix":
        """The mix of a batch whose runs of rows (`counts`, or one row each) have these adapters (None: the base)."""
        counts = counts or [1] * len(residents)
        tenants = _tenants(residents, counts)
        needs = Needs()
        for tenant in tenants:
            needs |= tenant.resident.packed.needs
        slots = [slot_of(resident) for resident in residents]
        slot_N = torch.tensor(slots, dtype=torch.int32)
        count_N = torch.tensor(counts)
        slot_T = slot_N.repeat_interleave(count_N)
        return cls(slot_T.to(device), tenants, needs)


def slot_of(resident: Resident | None) -> int:
    """The slot of an adapter; 0 for the base."""
    if resident is None:
        return 0
    return resident.slot


def _tenants(residents: list[Resident | None], counts: list[int]) -> list[Tenant]:
    """The adapters of runs of rows, in the order of their slots, each with all its rows."""
    rows: dict[int, list[Tensor]] = {}
    present: dict[int, Resident] = {}
    start = 0
    for resident, count in zip(residents, counts, strict=True):
        end = start + count
        if resident is not None:
            present[resident.slot] = resident
            runs = rows.setdefault(resident.slot, [])
            runs.append(torch.arange(start, end))
        start = end
    return [Tenant(present[slot], torch.cat(rows[slot])) for slot in sorted(present)]


class Entry:
    """What an adapter does at one site: its pieces as they lie in the arena."""

    def __init__(self, pool: Pool, slot: int, layer: int, site: int, inputs: int, outputs: int) -> None:
        self._columns = pool.host_KLSC[slot, layer, site].tolist()
        self._data = pool.arena.data
        self.rank = self._columns[RANK]
        self.inputs = inputs
        self.outputs = outputs
        self.function = FUNCTIONS[self._columns[packed.ACTIVATION]]

    def piece(self, column: int, *shape: int) -> Tensor | None:
        """One of its pieces, or None."""
        unit = self._columns[column]
        if unit == NOWHERE:
            return None
        start = unit * UNIT
        stop = start + torch.Size(shape).numel()
        return self._data[start:stop].view(shape)

    def update(self, x_TI: Tensor) -> Tensor | None:
        """v * (B (c * f(A x + bias))), or None where there are no factors."""
        if self.rank == 0:
            return None
        a_RI = self.piece(packed.A, self.rank, self.inputs)
        b_RO = self.piece(packed.B, self.rank, self.outputs)
        assert a_RI is not None and b_RO is not None
        bias_R = self.piece(packed.BIAS, self.rank)
        h_TR = self.function(linear(x_TI, a_RI, bias_R))
        c_R = self.piece(packed.C, self.rank)
        if c_R is not None:
            h_TR = h_TR * c_R
        y_TO = h_TR @ b_RO
        v_O = self.piece(packed.V, self.outputs)
        if v_O is not None:
            y_TO = v_O * y_TO
        return y_TO


class PlainMix:
    """Linear layers and norms of a mixed batch, in plain torch."""

    def __init__(self, base: Base, pool: Pool) -> None:
        self.base = base
        self.pool = pool

    def project(self, mix: Mix, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs [T, O] of a group of linear layers, with all that adapters do there."""
        group = self.base.groups[name]
        x_TI = self._scaled(mix, group, layer, x_TI)
        weight_OI = group.weight(layer, group.out)
        bias_O = group.bias(layer, group.out)
        y_TO = linear(x_TI, weight_OI, bias_O)
        for resident, row_T in mix.tenants:
            adapted_TO = self._adapted(resident.slot, group, layer, x_TI[row_T], y_TO[row_T])
            y_TO[row_T] = adapted_TO
        return y_TO

    def norm(self, mix: Mix, place: Place, x_TD: Tensor) -> Tensor:
        """RMS norm over the last dimension, with each row's own weight."""
        layer, name = place
        weight_D = self.base.norms[name][layer]
        width = len(weight_D)
        exact_TD = x_TD.float()
        square_T1 = exact_TD.square().mean(-1, keepdim=True)
        normed_TD = exact_TD * torch.rsqrt(square_T1 + self.base.shape.epsilon)
        result_TD = normed_TD * weight_D
        for resident, row_T in mix.tenants:
            entry = self._entry(resident.slot, layer, name, 0, width)
            own_D = entry.piece(packed.M, width)
            if own_D is not None:
                result_TD[row_T] = normed_TD[row_T] * own_D.float()
        return result_TD.to(x_TD.dtype)

    def _entry(self, slot: int, layer: int, site: str, inputs: int, outputs: int) -> Entry:
        number = self.base.sites[site]
        return Entry(self.pool, slot, layer, number, inputs, outputs)

    def _scaled(self, mix: Mix, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The inputs times what adapters scale them with, which only groups of one layer may have."""
        if len(group.sites) > 1 or not mix.needs.scales:
            return x_TI
        site = group.sites[0]
        x_TI = x_TI.clone()
        for resident, row_T in mix.tenants:
            entry = self._entry(resident.slot, layer, site.name, x_TI.shape[1], group.out)
            u_I = entry.piece(packed.U, entry.inputs)
            if u_I is not None:
                x_TI[row_T] *= u_I
        return x_TI

    def _adapted(self, slot: int, group: Group, layer: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The outputs of one adapter's rows, of which those of the base are changed in place."""
        for site in group.sites:
            entry = self._entry(slot, layer, site.name, site.inputs, site.out)
            apply(entry, x_TI, y_TO[:, site.rows])
        name = group.sites[0].name + BEHIND
        if name not in self.base.sites:
            return y_TO
        bottleneck = self._entry(slot, layer, name, group.out, group.out)
        update_TO = bottleneck.update(y_TO)
        beta_O = bottleneck.piece(packed.BETA, group.out)
        if update_TO is None or beta_O is None:
            return y_TO
        return y_TO + update_TO + beta_O


def apply(entry: Entry, x_TI: Tensor, y_TO: Tensor) -> None:
    """Make a site's outputs y those of an adapter, in place: m * (y + update) + beta."""
    update_TO = entry.update(x_TI)
    if update_TO is not None:
        y_TO += update_TO
    m_O = entry.piece(packed.M, entry.outputs)
    if m_O is not None:
        y_TO *= m_O
    beta_O = entry.piece(packed.BETA, entry.outputs)
    if beta_O is not None:
        y_TO += beta_O
