"""Whether an attempt is to save and return: its controller was warned, or somebody wants a pause."""

import time

from runfolder.chain import Attempt
from runfolder.files import refresh
from runfolder.requests import pause_step, stop_requested
from trainer.world import World

_PERIOD_S = 1.0


class StopRequests:
    """Looks into the run folder once a second, on rank 0 alone; the meter tells the others."""

    def __init__(self, attempt: Attempt, world: World) -> None:
        self._attempt = attempt
        self._world = world
        self._first = attempt.start.step if attempt.start else 0
        self._next_look = 0.0
        self._stop = False
        self._pause: int | None = None

    def wanted(self, step: int) -> bool:
        """Whether to save and return after this step."""
        if not self._world.leads:
            return False
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _PERIOD_S
            self._look()
        if self._stop:
            return True
        # An attempt that starts from where the run was paused goes on.
        return self._pause is not None and self._first < self._pause <= step

    def _look(self) -> None:
        """Read what is asked for from the run folder."""
        attempt = self._attempt
        refresh(attempt.folder)  # the controller may be on another host
        self._stop = stop_requested(attempt) is not None
        self._pause = pause_step(attempt.run_dir)
