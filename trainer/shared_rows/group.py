"""The ranks that share rows, and what they exchange; operations that dry runs and `torch.compile` know by shape.

Neighbours share rows, as they are on one machine. Shapes: S ranks of a group, N labels, n of
them on a rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_GROUPS: dict[int, dist.ProcessGroup] = {}  # that this rank is in, by their size


@dataclass(frozen=True)
class SequenceGroup:
    """So many ranks that share the positions of rows; this one has the part of `index`."""

    size: int = 1
    index: int = 0

    @classmethod
    def join(cls, size: int) -> "SequenceGroup":
        """The group of this rank among all ranks, whose number `size` divides; a collective over all ranks.

        Raises ValueError where it does not.
        """
        rank = dist.get_rank()
        world_size = dist.get_world_size()
        if world_size % size:
            raise ValueError(f"sharding.sequence: found {size} with {world_size} workers; allowed: a divisor of them")
        index = rank % size
        if size > 1 and size not in _GROUPS:
            own, _ = dist.new_subgroups(size)
            _GROUPS[size] = own
        return cls(size, index)

    def summed(self, own: Tensor) -> Tensor:
        """The sum over the group, on each of its ranks, which all compute the same from it."""
        if self.size == 1:
            return own
        total: Tensor = sum_over_group(own, self.size)
        return total

    def whole(self, own_n: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What the ranks of the group have computed of the labels of a micro-batch, of all of them [N], on each rank.

        `slot` [N] says where a label is among this rank's own, and behind them where it is another's.
        """
        if self.size == 1:
            return own_n
        of_others = own_n.new_zeros(1)
        slots = torch.cat([own_n, of_others])
        slot_N = batch["slot"]
        return self.summed(slots[slot_N])


OWN_ROWS = SequenceGroup()


@torch.library.custom_op("fleetune::sum_over_group", mutates_args=())
def sum_over_group(own: Tensor, size: int) -> Tensor:
    """The sum over the ranks of a group of this size."""
    total = own.clone()
    dist.all_reduce(total, group=_GROUPS[size])
    return total


@sum_over_group.register_fake
def _like_sum(own: Tensor, size: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(own)


def _keep_size(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    _, ctx.size = inputs


def _slope_of_own(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
    """The slopes that all ranks have of the sum, which are equal, together."""
    return slope * ctx.size, None


sum_over_group.register_autograd(_slope_of_own, setup_context=_keep_size)


@torch.library.custom_op("fleetune::exchange", mutates_args=())
def exchange(parts_S: Tensor) -> Tensor:
    """Send part s to rank s of the group of S ranks; gives what each of them sent here, in their order."""
    size = len(parts_S)
    contiguous = parts_S.contiguous()
    received = torch.empty_like(contiguous)
    dist.all_to_all_single(received, contiguous, group=_GROUPS[size])
    return received


@exchange.register_fake
def _like_exchange(parts_S: Tensor) -> Tensor:
    return torch.empty_like(parts_S, memory_format=torch.contiguous_format)


def _sent_back(ctx: Any, slope_S: Tensor) -> Tensor:  # noqa: ARG001
    back: Tensor = exchange(slope_S)
    return back


exchange.register_autograd(_sent_back)
