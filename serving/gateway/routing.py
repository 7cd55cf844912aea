"""Which replica answers a request: one that has its adapter, unless that one has far more to do than another.

An adapter that many ask for so comes to be on several replicas, and one that few ask for stays on one.
"""

from collections import OrderedDict
from collections.abc import Collection

MOST_HELD = 4096  # adapters of a replica
AHEAD = 8  # answers by which a replica may have more to do than another before the other one takes some


class Router:
    """Remembers who has what, and who is busy."""

    def __init__(self, replicas: int) -> None:
        self.loads = [0] * replicas  # answers under way
        self._held: list[OrderedDict[str, None]] = []
        for _ in range(replicas):
            self._held.append(OrderedDict())
        self._down: set[int] = set()

    @property
    def up(self) -> list[int]:
        """The replicas that answer."""
        up = []
        for number in range(len(self.loads)):
            if number not in self._down:
                up.append(number)
        return up

    def choose(self, digest: str | None, avoided: Collection[int] = ()) -> int | None:
        """The replica for a request, which counts as its load until `done`; None where all are down or avoided."""
        free = [number for number in self.up if number not in avoided]
        if not free:
            return None
        idlest = min(free, key=self._load)
        chosen = idlest
        holders = [number for number in free if digest in self._held[number]]
        if holders:
            holder = min(holders, key=self._load)
            if self.loads[holder] <= self.loads[idlest] + AHEAD:
                chosen = holder
        self.loads[chosen] += 1
        if digest is not None:
            self._remember(chosen, digest)
        return chosen

    def done(self, number: int) -> None:
        """Say that a replica has one answer less to do."""
        self.loads[number] -= 1

    def holders(self, digest: str) -> list[int]:
        """The replicas that have an adapter, as far as is known."""
        holders = []
        for number in self.up:
            if digest in self._held[number]:
                holders.append(number)
        return holders

    def failed(self, number: int) -> None:
        """Say that a replica is gone, and what it had with it."""
        self._down.add(number)
        self._held[number].clear()

    def recovered(self, number: int) -> None:
        """Say that a replica answers again."""
        self._down.discard(number)

    def _load(self, number: int) -> int:
        return self.loads[number]

    def _remember(self, number: int, digest: str) -> None:
        """Note that a replica has an adapter, and forget the one that was not asked for longest if there are many."""
        held = self._held[number]
        held[digest] = None
        held.move_to_end(digest)
        if len(held) > MOST_HELD:
            held.popitem(last=False)
