"""Whether an attempt is to save and return: its controller was warned, or somebody wants a pause."""

import time

from runfolder.chain import Attempt
from runfolder.files import refresh
from runfolder.requests import pause_due, stop_requested
from trainer.world import World

_PERIOD_S = 1.0


class Stopped(Exception):
    """This attempt leaves its work, as it was asked to, for another one that goes on after `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class StopRequests:
    """Looks into the run folder once a second, on rank 0 alone; the others are told."""

    def __init__(self, attempt: Attempt, world: World) -> None:
        self._attempt = attempt
        self._world = world
        start = attempt.start
        self.first = start.step if start else 0
        self._next_look = 0.0
        self._stop = False
        self._pause: int | None = None

    def wanted(self, step: int) -> bool:
        """Whether to save and return after this step, as rank 0 knows; the meter tells the others."""
        warned = self.warned()
        paused = self._pause is not None and self._pause <= step
        return warned or paused

    def pauses(self, step: int) -> bool:
        """Whether somebody wants a pause after this step, and there is time for what is no step; a collective."""
        wanted = self.wanted(step)
        has_time = not self._stop
        return self._world.told(wanted and has_time)

    def warned(self) -> bool:
        """Whether there is a deadline, so that what is no step has to be left too, as rank 0 knows."""
        if not self._world.leads:
            return False
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _PERIOD_S
            self._look()
        return self._stop

    def leave_if_warned(self, step: int) -> None:
        """Raise Stopped on every rank where there is a deadline; between the parts of long work, a collective."""
        if self._world.told(self.warned()):
            raise Stopped(step)

    def leave_before_first(self) -> None:
        """Raise Stopped on every rank where no step is to be taken at all; a collective.

        So is a run that was to pause after a step, and whose worker died once that was saved.
        """
        if self._world.told(self.wanted(self.first)):
            raise Stopped(self.first)

    def _look(self) -> None:
        """Read what is asked for from the run folder."""
        attempt = self._attempt
        refresh(attempt.folder)  # the controller may be on another host
        self._stop = stop_requested(attempt) is not None
        self._pause = pause_due(attempt)
