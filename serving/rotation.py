"""Rotary positions: the base's, and those of adapters that changed them (LongLoRA beyond the base's length).

Shapes: K kinds, P positions, T rows, F half of the rotary size.
"""

from torch import Tensor

from serving.base import FrozenBase
from serving.error import AdapterRefused
from serving.mix import Owner
from serving.packed import Packed

ROTATION_KINDS = 4


class Rotations:
    """Cosines and sines of every position, for a few kinds of rotary positions; kind 0 is the base's."""

    def __init__(self, base: FrozenBase, positions: int) -> None:
        """Have room for ROTATION_KINDS kinds of so many positions."""
        self._base = base
        self._positions = positions
        config = base.config
        cos_PF, sin_PF = base.rotation(config, positions)
        self.cos_KPF = cos_PF.repeat(ROTATION_KINDS, 1, 1)
        self.sin_KPF = sin_PF.repeat(ROTATION_KINDS, 1, 1)
        self._kinds = [config.rope_parameters]

    def kind(self, packed: Packed) -> int:
        """The number of an adapter's kind; raises AdapterRefused where there are too many."""
        config = packed.adapter.config
        if config is None:
            return 0
        parameters = config.rope_parameters
        if parameters in self._kinds:
            return self._kinds.index(parameters)
        number = len(self._kinds)
        if number == ROTATION_KINDS:
            raise AdapterRefused(
                f"adapter: found a further kind of rotary positions; allowed: {ROTATION_KINDS} at once"
            )
        cos_PF, sin_PF = self._base.rotation(config, self._positions)
        self.cos_KPF[number] = cos_PF
        self.sin_KPF[number] = sin_PF
        self._kinds.append(parameters)
        return number

    def at(self, kind_T: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, F] of rows."""
        device = self.cos_KPF.device
        kind_T = kind_T.to(device)
        position_T = position_T.to(device)
        cos_TF = self.cos_KPF[kind_T, position_T]
        sin_TF = self.sin_KPF[kind_T, position_T]
        return cos_TF, sin_TF


def rotation_of(owner: Owner) -> int:
    """The kind of an adapter's rotary positions; 0 for the base."""
    if owner is None:
        return 0
    return owner.rotation
