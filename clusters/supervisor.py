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
from clusters.entry import Entry
from clusters.environment import without_carried
from clusters.local import Local, needs
from clusters.machine import room
from clusters.ray_head import Head, Patience

TICK_S = 0.5
IDLE_S = 600.0


class Supervisor:
    """Serves the queue of one home."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._head = Head(local.folder)
        self._patience: dict[str, Patience] = defaultdict(Patience)
        self._busy = time.monotonic()
        self._damaged: dict[str, str] = {}

    def run(self) -> None:
        """Serve until nothing was queued for some minutes."""
        while time.monotonic() - self._busy < IDLE_S:
            process.reap()
            try:
                self.tick()
            except OSError:  # a full disk, say: the queue must be served when it is mended
                traceback.print_exc()
            time.sleep(TICK_S)
        self._head.end()
        self._head.forget()

    def tick(self) -> None:
        """Bring what runs in line with what is queued."""
        entries, damaged = self._local.queue.read()
        self._name(damaged)
        for entry in entries:
            if entry.settled and not self._runs(entry):
                self._forget(entry)
        entries = self._local.queue.list()
        if entries:
            self._busy = time.monotonic()
        address = self._head.keep() if entries else None
        dead = [entry for entry in entries if not self._runs(entry)]
        leaving = [entry for entry in dead if entry.finished or entry.cancelled]
        for entry in leaving:
            self._start(entry, address or "")  # only to close it or to deliver the rest: that needs no room
        waiting = [entry for entry in dead if entry not in leaving]
        if address:
            for entry in self._due(waiting):
                self._start(entry, address)

    def _name(self, damaged: dict[str, str]) -> None:
        """Say once of what is in the queue that it cannot be read."""
        before, self._damaged = self._damaged, damaged
        for run_id, why in damaged.items():
            if before.get(run_id) != why:
                print(f"left alone: {why}", flush=True)

    def _due(self, dead: list[Entry]) -> list[Entry]:
        """Runs whose controller died, then those whose turn has come."""
        had_turn = [entry for entry in dead if self._admitted(entry)]
        waiting = [entry for entry in dead if not self._admitted(entry)]
        return had_turn + fitting(waiting, room()[1] - self._local.taken())

    def _start(self, entry: Entry, address: str) -> None:
        patience = self._patience[entry.run_id]
        if not patience.ready():
            return
        lock = self._local.controller_lock(entry.run_id)
        process.end(lock)  # what a dead controller left of its session
        patience.began()
        given = {"FLEETUNE_HOME": str(self._local.home)} | entry.environment
        environment = without_carried(os.environ) | given | self._head.environment() | {"RAY_ADDRESS": address}
        try:
            process.spawn(lock, entry.command, environment, self._local.log(entry.run_id))
        except (OSError, ValueError) as error:  # of an environment that no process can have, say
            print(f"{entry.run_id} cannot be started: {error}", flush=True)

    def _forget(self, entry: Entry) -> None:
        process.end(self._local.controller_lock(entry.run_id))
        self._local.controller_lock(entry.run_id).unlink(missing_ok=True)
        self._patience.pop(entry.run_id, None)
        self._local.queue.remove(entry)

    def _runs(self, entry: Entry) -> bool:
        return process.owner(self._local.controller_lock(entry.run_id)) is not None

    def _admitted(self, entry: Entry) -> bool:
        return self._local.controller_lock(entry.run_id).exists()


def fitting(waiting: Iterable[Entry], free: int) -> list[Entry]:
    """The first of the waiting runs that fit; nobody overtakes one that has to wait."""
    chosen = []
    for entry in waiting:
        free -= needs(entry.workers)
        if free < 0:
            break
        chosen.append(entry)
    return chosen


def main() -> None:
    """Serve, and let go; who submitted meanwhile found the lock held, so look once more without it."""
    local = Local(Path(sys.argv[1]).absolute())
    try:
        local.check_here()
        Supervisor(local).run()
    except Unreachable as error:  # what serves this home is on another host, or came to be there
        sys.exit(str(error))
    process.release()
    if local.queue.list():
        local.start()


if __name__ == "__main__":
    main()
