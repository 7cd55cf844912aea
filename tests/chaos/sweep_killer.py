"""Who kills what of a sweep while it is driven, chosen by a seed: its own driver, and the processes of its runs."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from killer import PATIENCE_S, children
from scene import lives, signal_all, until, workers

from clusters.local import Local
from runfolder.chain import last_attempt
from runfolder.requests import last_reopened
from trainer.checkpoint.lineage import newest

VICTIMS = ("sweep", "controller", "driver", "worker")
LONGEST_REST_S = 5.0  # between two kills
COMMAND = [sys.executable, "-P", "-m", "orchestrator", "sweep"]


class SweepProcess:
    """`fleetune sweep` as a user has it running, and starts again where it has died."""

    def __init__(self, path: Path, log: Path) -> None:
        self._path, self._log = path, log
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen([*COMMAND, str(self._path), "--json"], stdout=subprocess.PIPE, stderr=log)

    def kill(self) -> None:
        """Kill it, and start another one."""
        self._process.kill()
        self._process.communicate()
        self._process = self._start()

    @property
    def has_ended(self) -> bool:
        """Whether it has come to its end."""
        return self._process.poll() is not None

    def table(self, timeout_s: float) -> Any:
        """What it prints at its end."""
        printed, _ = self._process.communicate(timeout=timeout_s)
        assert self._process.returncode == 0, self._log.read_text()[-3000:]
        return json.loads(printed)

    def end(self) -> None:
        """End it, whatever it has come to."""
        self._process.kill()
        self._process.wait()


class SweepKiller:
    """Kills what belongs to a sweep. `strikes`: how often each run was struck."""

    def __init__(self, cluster: Local, sweep: SweepProcess, rng: random.Random) -> None:
        self._cluster, self._sweep, self._rng = cluster, sweep, rng
        self._struck_at: dict[str, tuple[int, int]] = {}
        self._deck: list[str] = []
        self.strikes: Counter[str] = Counter()

    def strike(self) -> str:
        """Wait for a random time, and kill the next victim; gives a line about it."""
        self._deck = self._deck or self._rng.sample(VICTIMS, len(VICTIMS))
        victim = self._deck.pop()
        time.sleep(self._rng.uniform(0, LONGEST_REST_S))
        if victim == "sweep":
            self._sweep.kill()
            return victim
        run_id, pid = until(lambda: self._find(victim), PATIENCE_S)
        run_dir = self._cluster.home / "runs" / run_id
        self._struck_at[run_id] = progress_of(run_dir)
        self.strikes[run_id] += 1
        signal_all([pid], signal.SIGKILL)
        until(lambda: not lives(pid))
        attempt = last_attempt(run_dir).number
        return f"{victim} of {run_id} in attempt {attempt}"

    def _find(self, victim: str) -> tuple[str, int] | None:
        """A run and its process to kill; None while there is none."""
        assert not self._sweep.has_ended, "the sweep ended before all kills: it has too few trials"
        controllers = list(self._cluster.state()["controllers"].items())
        self._rng.shuffle(controllers)
        for run_id, controller in controllers:
            run_dir = self._cluster.home / "runs" / run_id
            # A second kill without progress would come near the limit of such attempts, after which a run has failed.
            if self._struck_at.get(run_id) == progress_of(run_dir):
                continue
            pids = [controller]
            if victim == "driver":
                pids = children(controller, "orchestrator.driver")
            elif victim == "worker":
                pids = [pid for pid in workers(last_attempt(run_dir)) if lives(pid)]
            if pids:
                return run_id, pids[0]
        return None


def progress_of(run_dir: Path) -> tuple[int, int]:
    """The step of a run's newest checkpoint, and the slot in which it was last let go on after a pause."""
    saved = newest(run_dir)
    step = saved.step if saved else 0
    return step, last_reopened(run_dir)
