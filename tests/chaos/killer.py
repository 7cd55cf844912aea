"""Who kills what of a run, and when: all chosen by a seed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from scene import lives, rows, signal_all, unfinished_saves, until, workers

from clusters.local import Local
from runfolder.chain import last_attempt, result

HEAD = ("head", "gcs_server", "raylet", "everything")
SPARED = ("supervisor",)  # the attempt survives the death of these
PATIENCE_S = 1800.0  # for what hangs: a busy machine may take minutes for a step


@dataclass(frozen=True)
class Kill:
    """Kill a victim at a moment: `steps` after so many of them, then in a `save`; in a `start`, or a `delivery`."""

    victim: str
    moment: str
    steps: int


def plan(rng: random.Random, number: int, most_steps: int) -> Iterator[Kill]:
    """Any five in a row that begin with a multiple of five hit worker, driver, controller, head and supervisor."""
    moment, deck = "start", []
    for _ in range(number):
        deck = deck or rng.sample(["worker", "driver", "controller", rng.choice(HEAD), "supervisor"], 5)
        victim = deck.pop()
        # Two early kills in a row would come near the limit of attempts without progress.
        moment = rng.choice(("steps", "save", "start") if moment != "start" else ("steps", "save"))
        yield Kill(victim, moment, rng.randint(4, most_steps))


class Killer:
    """Kills what belongs to one run, or to a stage of the one that was submitted."""

    def __init__(self, cluster: Local, run_dir: Path, rng: random.Random, submitted: str | None = None) -> None:
        self._cluster, self._run_dir, self._rng = cluster, run_dir, rng
        self._submitted = submitted or run_dir.name
        self._attempt, self._rows, self._spared = 0, 0, False

    def strike(self, kill: Kill) -> str:
        """Wait for the moment, and kill; gives a line about it."""
        began = time.monotonic()
        if kill.moment == "start" and not self._spared:
            time.sleep(self._rng.uniform(0, 8))
        elif kill.moment != "delivery":
            until(lambda: self._went_on(kill.steps), PATIENCE_S)
        waited_s = time.monotonic() - began
        if kill.moment == "save" and kill.victim == "worker":
            until(self._kill_saving_worker, PATIENCE_S, 0.0005)
        else:
            if kill.moment == "save":
                until(lambda: list(unfinished_saves(self._run_dir)), PATIENCE_S, 0.0005)
            pids = until(lambda: self.find(kill.victim), PATIENCE_S)
            signal_all(pids, signal.SIGKILL)
            until(lambda: not any(map(lives, pids)))
        self._note(kill)
        return f"{kill.victim} ({kill.moment}) after {waited_s:.1f} s, in attempt {self._attempt} at row {self._rows}"

    def _went_on(self, steps: int) -> bool:
        """Whether the run came so many steps further since the last kill."""
        assert result(self._run_dir) is None, "the job ended before all kills: it has too few steps"
        newest = last_attempt(self._run_dir).number
        known = self._rows if self._spared and newest == self._attempt else 0
        return (newest > self._attempt or self._spared) and len(rows(self._run_dir)) >= known + steps

    def _note(self, kill: Kill) -> None:
        self._attempt, self._rows = last_attempt(self._run_dir).number, len(rows(self._run_dir))
        self._spared = kill.victim in SPARED
        if kill.victim in ("supervisor", "everything"):
            self._cluster.start()  # as the next command of a user, or cron, would
            until(lambda: self._cluster.state()["supervisor"])

    def find(self, victim: str) -> list[int]:
        """The processes to kill; empty while they are not there."""
        state = self._cluster.state()
        pids = {"supervisor": state["supervisor"], "head": state["head"]}
        pids["controller"] = state["controllers"].get(self._submitted)
        if victim == "everything":
            return [pid for pid in pids.values() if pid]
        if victim == "worker":
            living = [pid for pid in workers(last_attempt(self._run_dir)) if lives(pid)]
            return [self._rng.choice(living)] if living else []
        if victim == "driver":
            return children(pids["controller"], "orchestrator.driver")
        if victim in pids:
            return [pid] if (pid := pids[victim]) else []
        return children(pids["head"], victim)

    def _kill_saving_worker(self) -> bool:
        """Kill a worker between the begin of its save and the end of it; False when there was no such moment."""
        for folder in unfinished_saves(self._run_dir):
            pids = workers(last_attempt(self._run_dir))
            rank = self._rng.randrange(len(pids))
            os.kill(pids[rank], signal.SIGSTOP)
            if not (folder / f"shard-{rank}.json").exists():
                os.kill(pids[rank], signal.SIGKILL)
                return True
            os.kill(pids[rank], signal.SIGCONT)
        return False


def children(parent: int | None, command: str) -> list[int]:
    """The children of a process whose command line names a command."""
    try:
        children = psutil.Process(parent).children() if parent else []
        return [child.pid for child in children if any(command in part for part in child.cmdline())][:1]
    except psutil.NoSuchProcess:
        return []
