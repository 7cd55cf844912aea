"""Whether an attempt is to save and return: its controller was warned, or somebody wants a pause."""

import time

from runfolder.chain import Attempt
from runfolder.files import refresh
from runfolder.requests import pause_step, stop_requested
from trainer.world import World

_PERIOD_S = 1.0


class StopWishes:
    """Looks into the run folder once a second, on rank 0 alone, which tells the others."""

    def __init__(self, attempt: Attempt, world: World) -> None:
        self._attempt, self._world = attempt, world
        self._first = attempt.start.step if attempt.start else 0
        self._next = 0.0
        self._stop = False
        self._pause: int | None = None

    def wanted(self, step: int) -> bool:
        """Whether to save and return after this step."""
        if not self._world.leads:
            return False
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PERIOD_S
            refresh(self._attempt.folder)  # the controller may be on another host
            self._stop = stop_requested(self._attempt) is not None
            self._pause = pause_step(self._attempt.run_dir)
        # An attempt that starts from where the run was paused goes on.
        paused = self._pause is not None and self._first < self._pause <= step
        return self._stop or paused
