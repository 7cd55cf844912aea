"""Which part of every parameter this rank holds: DeepSpeed's three layouts, by its private names.

Stage 0 keeps whole parameters on every rank. Stages 1 and 2 put all trained parameters into one flat vector, of which
each rank has a slice. Stage 3 has a slice of each parameter, and all slices of a rank in one flat vector.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Piece


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part [start, stop) of one flattened trained parameter that this rank holds: `owner` from `offset` on."""

    name: str
    start: int
    stop: int
    owner: torch.Tensor
    offset: int
    parameter: nn.Parameter

    @classmethod
    def of(cls, name: str, start: int, stop: int, owner: torch.Tensor, offset: int) -> "Fragment":
        """The elements of `owner` from `offset` on, as a parameter of their own that shares their memory."""
        view = owner.data.view(-1)[offset : offset + stop - start]
        return cls(name, start, stop, owner, offset, nn.Parameter(view))

    def take_gradient(self) -> None:
        """Let the parameter's gradient be the owner's."""
        grad = self.owner.grad
        part = slice(self.offset, self.offset + self.stop - self.start)
        self.parameter.grad = grad.view(-1)[part] if grad is not None else None


def fragments(engine: Any, names: dict[nn.Parameter, str], stage: int) -> Iterator[Fragment]:
    """The fragments of the named trained parameters that this rank holds under an engine."""
    if stage == 0:
        return _whole(names)
    if stage == 3:
        return _slices_of_each(engine.optimizer, names)
    return _slice_of_all(engine.optimizer, names)


def held(name: str, parameter: Any, stage: int) -> Piece | None:
    """The part of a frozen parameter that this rank holds under an engine; None where it holds nothing."""
    if stage != 3:
        return Piece(name, 0, {"weight": parameter.data.view(-1)}, True)
    start, stop = _own_slice(parameter)
    slice_: torch.Tensor = parameter.ds_tensor
    return Piece(name, start, {"weight": slice_.data[: stop - start]}, False) if start < stop else None


def _whole(names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    for parameter, name in names.items():
        yield Fragment.of(name, 0, parameter.numel(), parameter, 0)


def _slice_of_all(zero: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    (owner,) = zero.single_partition_of_fp32_groups
    size = int(zero.partition_size[0])
    left = dist.get_rank() * size
    for parameter, offset in zip(zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0], strict=True):
        start, stop = max(left, offset), min(left + size, offset + parameter.numel())
        if start < stop:
            yield Fragment.of(names[parameter], start - offset, stop - offset, owner, start - left)


def _slices_of_each(zero: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    (owner,) = zero.fp32_partitioned_groups_flat
    offset = 0
    for parameter in zero.fp16_groups[0]:
        start, stop = _own_slice(parameter)
        if start < stop:
            yield Fragment.of(names[parameter], start, stop, owner, offset)
        offset += parameter.partition_numel()


def _own_slice(parameter: Any) -> tuple[int, int]:
    """The range of a flattened parameter that this rank holds at stage 3; empty where only padding is left."""
    size = parameter.partition_numel()
    start = dist.get_rank() * size
    return start, min(start + size, parameter.ds_numel)
