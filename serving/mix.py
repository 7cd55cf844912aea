"""Rows of many adapters in one forward pass: which row has which, and the equation of a linear layer, in plain torch.

    Y = M_s * ((U_s * X) W^T + V_s * ((((U_s * X) A_s^T) * C_s) B_s)) + beta_s

for the rows of slot s, with the parts that its adapter has. This is the reference that the GPU's kernels are compared
with, and what the CPU runs. Rows of one adapter are computed apart from the others', so company changes nothing.
Shapes: T rows, I inputs, O outputs, R rank, D width.
"""

from dataclasses import dataclass, field
from itertools import accumulate
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
        rows: dict[int, list[Tensor]] = {}
        present: dict[int, Resident] = {}
        for resident, count, end in zip(residents, counts, accumulate(counts), strict=True):
            if resident is not None:
                present[resident.slot] = resident
                rows.setdefault(resident.slot, []).append(torch.arange(end - count, end))
        tenants = [Tenant(present[slot], torch.cat(rows[slot])) for slot in sorted(present)]
        needs = Needs()
        for tenant in tenants:
            needs |= tenant.resident.packed.needs
        slot_N = torch.tensor([0 if r is None else r.slot for r in residents], dtype=torch.int32)
        return cls(slot_N.repeat_interleave(torch.tensor(counts)).to(device), tenants, needs)


class Entry:
    """What an adapter does at one site: its pieces as they lie in the arena."""

    def __init__(self, pool: Pool, slot: int, layer: int, site: int, inputs: int, outputs: int) -> None:
        self._row = pool.host_KLSC[slot, layer, site].tolist()
        self._data = pool.arena.data
        self.rank, self.inputs, self.outputs = self._row[RANK], inputs, outputs
        self.function = FUNCTIONS[self._row[packed.ACTIVATION]]

    def piece(self, column: int, *shape: int) -> Tensor | None:
        """One of its pieces, or None."""
        if self._row[column] == NOWHERE:
            return None
        start, size = self._row[column] * UNIT, torch.Size(shape).numel()
        return self._data[start : start + size].view(shape)

    def update(self, x_TI: Tensor) -> Tensor | None:
        """v * (B (c * f(A x + bias))), or None where there are no factors."""
        if self.rank == 0:
            return None
        a_RI, b_RO = self.piece(packed.A, self.rank, self.inputs), self.piece(packed.B, self.rank, self.outputs)
        assert a_RI is not None and b_RO is not None
        h_TR = self.function(linear(x_TI, a_RI, self.piece(packed.BIAS, self.rank)))
        if (c_R := self.piece(packed.C, self.rank)) is not None:
            h_TR = h_TR * c_R
        y_TO = h_TR @ b_RO
        v_O = self.piece(packed.V, self.outputs)
        return y_TO if v_O is None else v_O * y_TO


class PlainMix:
    """Linear layers and norms of a mixed batch, in plain torch."""

    def __init__(self, base: Base, pool: Pool) -> None:
        self.base, self.pool = base, pool

    def project(self, mix: Mix, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs [T, O] of a group of linear layers, with all that adapters do there."""
        group = self.base.groups[name]
        x_TI = self._scaled(mix, group, layer, x_TI)
        bias_O = None if group.bias_LN is None else group.bias_LN[layer, : group.out]
        y_TO = linear(x_TI, group.weight_LNI[layer, : group.out], bias_O)
        for tenant in mix.tenants:
            rows = tenant.row_T
            y_TO[rows] = self._adapted(tenant.resident.slot, group, layer, x_TI[rows], y_TO[rows])
        return y_TO

    def norm(self, mix: Mix, place: Place, x_TD: Tensor) -> Tensor:
        """RMS norm over the last dimension, with each row's own weight."""
        layer, name = place
        weight_D = self.base.norms[name][layer]
        exact_TD = x_TD.float()
        normed_TD = exact_TD * torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + self.base.shape.epsilon)
        result_TD = normed_TD * weight_D
        for tenant in mix.tenants:
            own_D = self._entry(tenant.resident.slot, layer, name, 0, len(weight_D)).piece(packed.M, len(weight_D))
            if own_D is not None:
                result_TD[tenant.row_T] = normed_TD[tenant.row_T] * own_D.float()
        return result_TD.to(x_TD.dtype)

    def _entry(self, slot: int, layer: int, site: str, inputs: int, outputs: int) -> Entry:
        return Entry(self.pool, slot, layer, self.base.sites[site], inputs, outputs)

    def _scaled(self, mix: Mix, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        if len(group.sites) > 1 or not mix.needs.scales:
            return x_TI
        x_TI = x_TI.clone()
        for tenant in mix.tenants:
            entry = self._entry(tenant.resident.slot, layer, group.sites[0].name, x_TI.shape[1], group.out)
            if (u_I := entry.piece(packed.U, entry.inputs)) is not None:
                x_TI[tenant.row_T] *= u_I
        return x_TI

    def _adapted(self, slot: int, group: Group, layer: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        for site in group.sites:
            entry = self._entry(slot, layer, site.name, site.inputs, site.stop - site.start)
            own_TO = y_TO[:, site.start : site.stop]
            if (update_TO := entry.update(x_TI)) is not None:
                own_TO += update_TO
            if (m_O := entry.piece(packed.M, entry.outputs)) is not None:
                own_TO *= m_O
            if (beta_O := entry.piece(packed.BETA, entry.outputs)) is not None:
                own_TO += beta_O
        if (name := group.sites[0].name + BEHIND) in self.base.sites:
            behind = self._entry(slot, layer, name, group.out, group.out)
            update_TO, beta_O = behind.update(y_TO), behind.piece(packed.BETA, group.out)
            if update_TO is not None and beta_O is not None:
                y_TO = y_TO + update_TO + beta_O
        return y_TO
