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
from trainer.zero.gather import is_sharded

ParameterNames = dict[nn.Parameter, str]  # of the trained parameters


@dataclass(frozen=True, eq=False)
class OwnedFragment:
    """The part [start, stop) of one flattened trained parameter that this rank holds: `owner` from `offset` on."""

    name: str
    start: int
    stop: int
    owner: torch.Tensor
    offset: int
    parameter: nn.Parameter

    @classmethod
    def of(cls, name: str, start: int, stop: int, owner: torch.Tensor, offset: int) -> "OwnedFragment":
        """The elements of `owner` from `offset` on, as a parameter of their own that shares their memory."""
        values = owner.data
        flat = values.view(-1)
        length = stop - start
        end = offset + length
        view = flat[offset:end]
        parameter = nn.Parameter(view)
        parameter.grad_dtype = torch.float32  # also of weights in bf16
        return cls(name, start, stop, owner, offset, parameter)

    def take_gradient(self) -> None:
        """Let the parameter's gradient be the owner's."""
        grad = self.owner.grad
        if grad is None:
            self.parameter.grad = None
            return
        flat = grad.view(-1)
        length = self.stop - self.start
        end = self.offset + length
        self.parameter.grad = flat[self.offset : end]

    def drop_gradient(self) -> None:
        """Let go of the gradient, which would live through the next step's passes beside that step's own."""
        self.parameter.grad = None


def fragments(engine: Any, names: ParameterNames, stage: int) -> Iterator[OwnedFragment]:
    """The fragments of the named trained parameters that this rank holds under an engine."""
    if stage == 0:
        return _whole_parameters(names)
    if stage == 3:
        return _slices_of_each(engine.optimizer, names)
    return _slice_of_all(engine.optimizer, names)


def share_masters(engine: Any, stage: int) -> None:
    """Let the fp32 masters of this rank be its part of the weights, of which stages 1 and 2 keep a second copy.

    Trained weights are fp32 themselves, and DeepSpeed copies the masters into that very place after a step.
    """
    if stage not in (1, 2):
        return
    zero = engine.optimizer
    (owner,) = zero.single_partition_of_fp32_groups
    partitions = zero.parallel_partitioned_bit16_groups[0]
    rank = dist.get_rank()
    owner.data = partitions[rank].data


def held_piece(name: str, parameter: Any) -> Piece | None:
    """The part of a parameter that this rank holds, where no engine trains it; None where it holds nothing."""
    if not is_sharded(parameter):
        flat: torch.Tensor = parameter.data.view(-1)
        return Piece(name, 0, {"weight": flat}, True)
    start, stop = _slice_of_rank(parameter)
    if start >= stop:
        return None
    padded: torch.Tensor = parameter.ds_tensor
    length = stop - start
    weight = padded.data[:length]
    return Piece(name, start, {"weight": weight}, False)


def _whole_parameters(names: ParameterNames) -> Iterator[OwnedFragment]:
    """Stage 0: every parameter, whole on every rank."""
    for parameter, name in names.items():
        elements = parameter.numel()
        yield OwnedFragment.of(name, 0, elements, parameter, 0)


def _slice_of_all(zero: Any, names: ParameterNames) -> Iterator[OwnedFragment]:
    """Stages 1 and 2: the parameters' parts that lie in this rank's slice [left, right) of the vector of all."""
    (owner,) = zero.single_partition_of_fp32_groups
    parameters = zero.round_robin_bit16_groups[0]
    offsets = zero.round_robin_bit16_offsets[0]
    size = int(zero.partition_size[0])
    rank = dist.get_rank()
    left = rank * size
    right = left + size
    for parameter, offset in zip(parameters, offsets, strict=True):
        end = offset + parameter.numel()
        start = max(left, offset)
        stop = min(right, end)
        if start < stop:
            name = names[parameter]
            first = start - offset
            last = stop - offset
            inside = start - left
            yield OwnedFragment.of(name, first, last, owner, inside)


def _slices_of_each(zero: Any, names: ParameterNames) -> Iterator[OwnedFragment]:
    """Stage 3: this rank's slice of each parameter, one behind the other in the vector that it owns."""
    (owner,) = zero.fp32_partitioned_groups_flat
    offset = 0
    parameters = zero.fp16_groups[0]
    for parameter in parameters:
        start, stop = _slice_of_rank(parameter)
        if start < stop:
            name = names[parameter]
            yield OwnedFragment.of(name, start, stop, owner, offset)
        offset += parameter.partition_numel()


def _slice_of_rank(parameter: Any) -> tuple[int, int]:
    """The range of a flattened parameter that this rank holds at stage 3; empty where only padding is left."""
    size = parameter.partition_numel()
    rank = dist.get_rank()
    start = rank * size
    end = start + size
    stop = min(end, parameter.ds_numel)
    return start, stop
