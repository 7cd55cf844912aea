"""What a backend gives the contract suite: one of its clusters, and a hand on what happens there."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Place(Protocol):
    """A cluster that the clusters file of FLEETUNE_CLUSTERS has under `name`; nothing else runs there.

    Run folders and other files below `root` are there and here under the same paths. A run over `resources` takes all
    of it. In words, `waits` is the form of what it says of a run that waits for others to end, and `lost` of one that
    it does not know any more.
    """

    name: str
    root: Path
    resources: dict[str, int]
    waits: str
    lost: str

    def filled(self) -> AbstractContextManager[None]:
        """Let what is submitted wait for others, in the block; behind it, it starts."""
        ...

    def taken(self) -> list[str]:
        """The runs that it has for work or for the queue: a run id for each job of it."""
        ...

    def forget(self, run_id: str) -> None:
        """Let it lose the job of a run that waits."""
        ...

    def end_worker(self, run_id: str) -> None:
        """Kill the process that has rank 0 of a run."""
        ...

    def warn(self, run_id: str) -> None:
        """Make a run give way to something else, with a warning; it may go on soon."""
        ...

    def lose_node(self) -> None:
        """A power failure where the last workers of a run are; the node is there again soon."""
        ...

    def is_idle(self) -> bool:
        """Whether nothing of any run is left, no process and no job."""
        ...
