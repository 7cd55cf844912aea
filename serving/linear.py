"""The equation of a linear layer with adapters, in plain torch.

    Y = M_s * ((U_s * X) W^T + V_s * ((((U_s * X) A_s^T) * C_s) B_s)) + beta_s

for the rows of adapter s, with the parts that it has. This is the reference that the GPU's kernels are compared
with, and what the CPU runs. Rows of one adapter are computed apart from the others', so company changes nothing.
Shapes: T rows, I inputs, O outputs, R rank, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from serving.adapter import Place
from serving.base import BEHIND, FrozenBase
from serving.group import Group
from serving.mix import AdapterBatch
from serving.packed import NOWHERE, UNIT, Column
from serving.pool import Pool

FUNCTIONS = (lambda x: x, relu, gelu, silu)  # by number, as serving.adapter.ACTIVATION_NAMES


@dataclass
class Entry:
    """What an adapter does at one submodule: its tensors as they lie in the arena."""

    columns: list[int]
    arena: Tensor
    inputs: int
    outputs: int

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.columns[Column.RANK]

    def tensor(self, column: Column, *shape: int) -> Tensor | None:
        """One of its tensors, or None."""
        unit = self.columns[column]
        if unit == NOWHERE:
            return None
        size = torch.Size(shape)
        start = unit * UNIT
        stop = start + size.numel()
        numbers = self.arena[start:stop]
        return numbers.view(size)

    def update(self, x_TI: Tensor) -> Tensor | None:
        """v * (B (c * f(A x + bias))), or None where there are no factors."""
        rank = self.rank
        if rank == 0:
            return None
        a_RI = self.tensor(Column.A, rank, self.inputs)
        b_RO = self.tensor(Column.B, rank, self.outputs)
        assert a_RI is not None
        assert b_RO is not None
        c_R = self.tensor(Column.C, rank)
        v_O = self.tensor(Column.V, self.outputs)
        bias_R = self.tensor(Column.BIAS, rank)
        activation = self.columns[Column.ACTIVATION]
        function = FUNCTIONS[activation]
        h_TR = linear(x_TI, a_RI, bias_R)
        h_TR = function(h_TR)
        if c_R is not None:
            h_TR = h_TR * c_R
        y_TO = h_TR @ b_RO
        if v_O is not None:
            y_TO = v_O * y_TO
        return y_TO

    def apply(self, x_TI: Tensor, y_TO: Tensor) -> None:
        """Make the submodule's outputs y those of the adapter, in place: m * (y + update) + beta."""
        update_TO = self.update(x_TI)
        m_O = self.tensor(Column.M, self.outputs)
        beta_O = self.tensor(Column.BETA, self.outputs)
        if update_TO is not None:
            y_TO += update_TO
        if m_O is not None:
            y_TO *= m_O
        if beta_O is not None:
            y_TO += beta_O

    def apply_behind(self, y_TO: Tensor) -> Tensor:
        """The outputs y behind a bottleneck, where there is one: y + update + beta."""
        update_TO = self.update(y_TO)
        beta_O = self.tensor(Column.BETA, self.outputs)
        if update_TO is None:
            return y_TO
        assert beta_O is not None
        return y_TO + update_TO + beta_O


class PlainLinears:
    """Linear layers and norms of a mixed batch, in plain torch."""

    def __init__(self, base: FrozenBase, pool: Pool) -> None:
        self.base = base
        self.pool = pool
        self.arena = pool.arena.data
        self.epsilon = base.shape.epsilon

    def project(self, adapters: AdapterBatch, name: str, layer: int, x_TI: Tensor) -> Tensor:
        """The outputs [T, O] of a group of linear layers, with all that adapters do there."""
        group = self.base.groups[name]
        outputs = group.outputs
        weight_OI = group.weight(layer, outputs)
        bias_O = group.bias(layer, outputs)
        x_TI = self._scaled(adapters, group, layer, x_TI)
        y_TO = linear(x_TI, weight_OI, bias_O)
        for resident, row_T in adapters.members:
            own_TI = x_TI[row_T]
            base_TO = y_TO[row_T]
            adapted_TO = self._adapted(resident.index, group, layer, own_TI, base_TO)
            y_TO[row_T] = adapted_TO
        return y_TO

    def norm(self, adapters: AdapterBatch, place: Place, x_TD: Tensor) -> Tensor:
        """RMS norm over the last dimension, with each row's own weight."""
        layer, name = place
        weight_LD = self.base.norms[name]
        weight_D = weight_LD[layer]
        width = len(weight_D)
        exact_TD = x_TD.float()
        square_TD = exact_TD.square()
        mean_T1 = square_TD.mean(-1, keepdim=True)
        scale_T1 = torch.rsqrt(mean_T1 + self.epsilon)
        normed_TD = exact_TD * scale_T1
        result_TD = normed_TD * weight_D
        for resident, row_T in adapters.members:
            entry = self._entry(resident.index, place, 0, width)
            own_D = entry.tensor(Column.M, width)
            if own_D is not None:
                own_TD = normed_TD[row_T]
                result_TD[row_T] = own_TD * own_D.float()
        return result_TD.to(x_TD.dtype)

    def _entry(self, index: int, place: Place, inputs: int, outputs: int) -> Entry:
        """What the adapter of an index does at a place."""
        layer, submodule = place
        number = self.base.submodules[submodule]
        table_SC = self.pool.host_KLSC[index, layer]
        row_C = table_SC[number]
        columns: list[int] = row_C.tolist()
        return Entry(columns, self.arena, inputs, outputs)

    def _scaled(self, adapters: AdapterBatch, group: Group, layer: int, x_TI: Tensor) -> Tensor:
        """The inputs times what adapters scale them with, which only groups of one layer may have."""
        if group.sections > 1:
            return x_TI
        if not adapters.needs.scales:
            return x_TI
        place = (layer, group.first_linear)
        inputs = x_TI.shape[1]
        outputs = group.outputs
        x_TI = x_TI.clone()
        for resident, row_T in adapters.members:
            entry = self._entry(resident.index, place, inputs, outputs)
            u_I = entry.tensor(Column.U, inputs)
            if u_I is not None:
                x_TI[row_T] *= u_I
        return x_TI

    def _adapted(self, index: int, group: Group, layer: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The outputs of one adapter's rows, of which those of the base are changed in place."""
        for linear_layer in group.linears:
            place = (layer, linear_layer.name)
            entry = self._entry(index, place, linear_layer.inputs, linear_layer.outputs)
            section_TO = y_TO[:, linear_layer.rows]
            entry.apply(x_TI, section_TO)
        if not group.is_residual:
            return y_TO
        outputs = group.outputs
        behind = (layer, group.first_linear + BEHIND)
        bottleneck = self._entry(index, behind, outputs, outputs)
        return bottleneck.apply_behind(y_TO)
