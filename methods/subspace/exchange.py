"""What ranks tell each other in a subspace method: flat vectors in slices, and whole matrices at a refresh."""

from collections import Counter

import torch
import torch.distributed as dist

from methods.subspace.matrix import BLOCK


class Exchange:
    """How a flat vector lies over ranks, the collectives on it, and a count of the elements that went through them.

    `replicated`: every rank keeps all of the vector, else an even slice in whole blocks.
    `partial`: what ranks put in are shares of a sum even where they are replicated.
    """

    def __init__(self, length: int, replicated: bool, partial: bool) -> None:
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.replicated, self.partial = replicated, partial
        parts = 1 if replicated else self.world
        share = -(-length // (BLOCK * parts)) * BLOCK
        self.length = share * parts
        self.own = slice(0, share) if replicated else slice(self.rank * share, (self.rank + 1) * share)
        self.sent: Counter[str] = Counter()

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.world == 1

    @property
    def silent(self) -> bool:
        """Whether there is nobody to tell of the vector, or nothing in it."""
        return self.alone or self.length == 0

    def reduce(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the sum of all ranks' vectors."""
        if self.silent or (self.replicated and not self.partial):
            return flat
        self.sent["projected"] += flat.numel()
        if self.replicated:
            dist.all_reduce(flat)
            return flat
        own = flat.new_empty(self.own.stop - self.own.start)
        dist.reduce_scatter_tensor(own, flat)
        return own

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """All slices."""
        if self.silent or self.replicated:
            return own
        self.sent["updates"] += self.length
        flat = own.new_empty(self.length)
        dist.all_gather_into_tensor(flat, own)
        return flat

    def sum_shares(self, tensor: torch.Tensor) -> None:
        """Make a gradient that ranks hold shares of the sum, in place."""
        if self.partial and not self.alone:
            self.sent["others"] += tensor.numel()
            dist.all_reduce(tensor)

    def sum_slices(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of small figures that each rank took from its own slice, in place."""
        if not (self.alone or self.replicated):
            dist.all_reduce(tensor)
        return tensor

    def collect(self, whole: torch.Tensor, owner: int) -> None:
        """Make a tensor on its owner the sum of all ranks' shares, in place."""
        if not self.alone and (self.partial or not self.replicated):
            self.sent["full"] += whole.numel()
            dist.reduce(whole, owner)

    def spread(self, whole: torch.Tensor, owner: int) -> None:
        """Make a tensor everywhere what it is on its owner, in place."""
        if not self.alone:
            self.sent["bases"] += whole.numel()
            dist.broadcast(whole, owner)
