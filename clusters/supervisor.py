"""The supervisor of the local cluster: `python -m clusters.supervisor HOME`, one per home, detached.

It keeps the Ray head up while there is work, starts waiting runs in the order of submission as they fit, and starts
the controller of a run again until the run has its result, and MLflow all of it. Whether a run is tried again is the
controller's to say. It keeps nothing in memory that matters: after its death the next one finds all by files and
locks.
"""

import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from clusters import process
from clusters.base import Unreachable
from clusters.entry import QueueEntry, queued_run
from clusters.environment import machine_variables
from clusters.local import Local
from clusters.machine import capacity_needed, total_capacity
from clusters.ray_head import Backoff, Head
from runfolder.latest_start import note_latest_start

TICK_S = 0.5
IDLE_S = 600.0


class Supervisor:
    """Serves the queue of one home."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._head = Head(local.folder)
        self._backoffs: dict[str, Backoff] = defaultdict(Backoff)
        self._busy = time.monotonic()
        self._damaged: dict[str, str] = {}

    def run(self) -> None:
        """Serve until nothing was queued for some minutes."""
        while time.monotonic() - self._busy < IDLE_S:
            process.reap()
            try:
                self.tick()
            except OSError:  # a full disk, say: the queue must be served when there is space again
                traceback.print_exc()
            time.sleep(TICK_S)
        self._head.end()
        self._head.forget()

    def tick(self) -> None:
        """Bring what runs in line with what is queued."""
        entries, damaged = self._local.queue.read()
        running, leaving, waiting = 0, [], []
        for queued in map(queued_run, entries):
            if self._is_running(queued.entry):
                running += 1
            elif queued.damaged:
                damaged[queued.entry.run_id] = queued.damaged
            elif queued.settled:
                self._forget(queued.entry)
            elif queued.finished or queued.cancelled:
                leaving.append(queued.entry)
            else:
                waiting.append(queued.entry)
        self._report_damaged(damaged)
        has_work = bool(running or leaving or waiting)
        if has_work:
            self._busy = time.monotonic()
        address = self._head.keep() if has_work else None
        for entry in leaving:
            self._start(entry, address or "")  # only to close it or to deliver the rest: that needs no capacity
        if address:
            for entry in self._due(waiting):
                self._start(entry, address)

    def _report_damaged(self, damaged: dict[str, str]) -> None:
        """Print once of each run that cannot be served why it cannot."""
        before = self._damaged
        self._damaged = damaged
        for run_id, reason in damaged.items():
            if before.get(run_id) != reason:
                print(f"left alone: {reason}", flush=True)

    def _due(self, dead: list[QueueEntry]) -> list[QueueEntry]:
        """Runs whose controller died, then those whose turn has come."""
        admitted, waiting = [], []
        for entry in dead:
            if self._is_admitted(entry):
                admitted.append(entry)
            else:
                waiting.append(entry)
        _, total = total_capacity()
        free = total - self._local.taken_workers()
        return admitted + fitting(waiting, free)

    def _start(self, entry: QueueEntry, address: str) -> None:
        backoff = self._backoffs[entry.run_id]
        if not backoff.ready():
            return
        lock = self._local.controller_lock(entry.run_id)
        process.end(lock)  # what a dead controller left of its session
        backoff.began()
        carried = {"FLEETUNE_HOME": str(self._local.home)} | entry.environment
        ray = self._head.environment() | {"RAY_ADDRESS": address}
        environment = machine_variables(os.environ) | carried | ray
        had_its_turn = lock.exists()
        note_latest_start(entry.run_dir)
        try:
            process.spawn(lock, entry.command, environment, self._local.log(entry.run_id))
        except (OSError, ValueError) as error:  # of an environment that no process can have, say
            print(f"{entry.run_id} cannot be started: {error}", flush=True)
            if not had_its_turn:
                lock.unlink(missing_ok=True)  # else it would hold its place

    def _forget(self, entry: QueueEntry) -> None:
        lock = self._local.controller_lock(entry.run_id)
        process.end(lock)
        lock.unlink(missing_ok=True)
        self._backoffs.pop(entry.run_id, None)
        self._local.queue.remove(entry)

    def _is_running(self, entry: QueueEntry) -> bool:
        lock = self._local.controller_lock(entry.run_id)
        return process.owner(lock) is not None

    def _is_admitted(self, entry: QueueEntry) -> bool:
        lock = self._local.controller_lock(entry.run_id)
        return lock.exists()


def fitting(waiting: Iterable[QueueEntry], free: int) -> list[QueueEntry]:
    """The first of the waiting runs that fit; nobody overtakes one that has to wait."""
    chosen = []
    for entry in waiting:
        free -= capacity_needed(entry.workers)
        if free < 0:
            break
        chosen.append(entry)
    return chosen


def main() -> None:
    """Serve the queue until it was empty for some minutes, then release the lock."""
    local = Local(Path(sys.argv[1]).absolute())
    try:
        local.check_here()
        Supervisor(local).run()
    except Unreachable as error:  # what serves this home is on another host, or came to be there
        sys.exit(str(error))
    process.release()
    # Who submitted just before found the lock held and started nobody: look once more without it.
    if not all(queued_run(entry).damaged for entry in local.queue.list()):
        local.start()


if __name__ == "__main__":
    main()
