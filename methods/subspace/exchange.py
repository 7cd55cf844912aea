"""What ranks tell each other in a subspace method: flat vectors in slices, and whole matrices at a refresh."""

from collections import Counter

import torch.distributed as dist
from torch import Tensor

from methods.subspace.matrix import BLOCK, ceil_div


class Exchange:
    """How a flat vector lies over ranks, the collectives on it, and a count of the elements that went through them.

    `replicated`: every rank keeps all of the vector, else an even slice in whole blocks, which is `owned`.
    `grads_are_partial`: what ranks put in are shares of a sum even where they are replicated.
    """

    def __init__(self, length: int, replicated: bool, grads_are_partial: bool) -> None:
        self.world_size = 1
        self.rank = 0
        if dist.is_initialized():
            self.world_size = dist.get_world_size()
            self.rank = dist.get_rank()
        self.replicated = replicated
        self.grads_are_partial = grads_are_partial
        parts = self.world_size
        if replicated:
            parts = 1
        blocks = ceil_div(length, BLOCK * parts)
        share = blocks * BLOCK
        self.length = share * parts
        first = self.rank * share
        if replicated:
            first = 0
        self.owned = slice(first, first + share)
        self.owned_length = share
        self.sent: Counter[str] = Counter()

    @property
    def is_single(self) -> bool:
        """Whether this rank is alone, and nothing is exchanged."""
        return self.world_size == 1

    @property
    def is_idle(self) -> bool:
        """Whether there is no other rank to tell of the vector, or nothing in it."""
        is_empty = self.length == 0
        return is_empty or self.is_single

    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """This rank's slice of the sum of all ranks' vectors; where it is replicated, all of the sum."""
        if self.is_idle:
            return flat
        if self.replicated and not self.grads_are_partial:
            return flat
        self.sent["projected"] += flat.numel()
        if self.replicated:
            dist.all_reduce(flat)
            return flat
        owned = flat.new_empty(self.owned_length)
        dist.reduce_scatter_tensor(owned, flat)
        return owned

    def all_gather(self, owned: Tensor) -> Tensor:
        """The slices of all ranks, one behind the other."""
        if self.is_idle or self.replicated:
            return owned
        self.sent["updates"] += self.length
        flat = owned.new_empty(self.length)
        dist.all_gather_into_tensor(flat, owned)
        return flat

    def all_reduce_partial(self, grad: Tensor) -> None:
        """Make a gradient that ranks hold shares of the sum, in place; nothing where it is no share."""
        if self.grads_are_partial and not self.is_single:
            self.sent["others"] += grad.numel()
            dist.all_reduce(grad)

    def all_reduce_slices(self, scalars: Tensor) -> Tensor:
        """The sum of a few scalars that each rank took from its slice, in place; nothing where it is replicated."""
        if not (self.is_single or self.replicated):
            dist.all_reduce(scalars)
        return scalars

    def reduce_to(self, owner: int, whole: Tensor) -> None:
        """Make a tensor on its owner the sum of all ranks' shares, in place."""
        if self.is_single:
            return
        if self.grads_are_partial or not self.replicated:
            self.sent["full"] += whole.numel()
            dist.reduce(whole, owner)

    def broadcast_from(self, owner: int, whole: Tensor) -> None:
        """Make a tensor everywhere what it is on its owner, in place."""
        if not self.is_single:
            self.sent["bases"] += whole.numel()
            dist.broadcast(whole, owner)
