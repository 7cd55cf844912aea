"""Watching an attempt: the driver process that holds its workers, and all that can end it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from clusters.ray_head import answers
from orchestrator.failure import Failure, load
from orchestrator.verdict import Verdict, classify
from runfolder.appended import ending, read_lines
from runfolder.chain import Attempt, slots
from runfolder.files import read_json
from runfolder.record import load_job
from runfolder.requests import (
    Stop,
    cancel_requested,
    cancel_saves,
    last_reopened,
    request_stop,
    stop_requested,
)
from trainer import missing

_POLL_S = 0.25  # between two looks at the driver process
_LOOK_S = 1.0  # between two looks at the run folder, which may be on a file system that many share
_TAIL = 16_384  # bytes at the end of a log in which evidence is looked for
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


class Driver:
    """The process that runs `orchestrator.driver`. It connects to Ray while the attempt is being claimed."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-P", "-m", "orchestrator.driver", str(run_dir)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | _DRIVER_ENVIRONMENT)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def begin(self, attempt: Attempt) -> None:
        """Have it start the workers of an attempt."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{attempt.number}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it is dead, as the watch will see

    def kill(self) -> None:
        """End it, and with it the workers."""
        self._process.kill()
        self._process.wait()


class Watch:
    """Looks at an attempt until something ends it.

    What can wait is asked of the trainer, with a deadline (see runfolder/requests.py): it saves and returns. `told`
    is set when whoever started this controller wants it to end.
    """

    def __init__(self, attempt: Attempt, driver: Driver, told: threading.Event) -> None:
        self._attempt = attempt
        self._driver = driver
        self._told = told
        self._resources = load_job(attempt.run_dir).resources
        self._hang_after_s = float(os.environ.get("FLEETUNE_HANG_AFTER", "1800"))
        self._began = time.monotonic()
        self._opened = _opened(attempt.run_dir)
        self._unanswered = 0

    def until_end(self) -> Verdict:
        """How the attempt ended; raises Fenced when another one took over."""
        looked = 0.0
        while self._driver.exit_code is None:
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                if verdict := self._look():
                    return verdict
            time.sleep(_POLL_S)
        self._attempt.check()
        return self._judge()

    def _look(self) -> Verdict | None:
        """Whether the attempt must be ended now."""
        self._attempt.check(here=True)
        if cancel_requested(self._attempt.run_dir) and not cancel_saves(self._attempt.run_dir):
            return Verdict("cancelled", "")
        if wanted := self._wanted():
            request_stop(self._attempt, wanted)
        asked = stop_requested(self._attempt)
        if asked and time.time() > asked.by:
            late = f"no checkpoint within {self._resources.grace} s"
            return Verdict(asked.why, "; ".join(filter(None, [asked.reason, late])))
        return self._stuck()

    def _wanted(self) -> Stop | None:
        """Whether the attempt is to save and end, and why."""
        by = time.time() + self._resources.grace
        if self._told.is_set():
            return Stop("preemption", "the controller was told to end", by)
        if cancel_saves(self._attempt.run_dir):
            return Stop("cancelled", "", by)
        walltime = self._resources.walltime
        if walltime and time.time() > self._opened + walltime - self._resources.grace:
            reason = f"resources.walltime of {walltime} s is over"
            return Stop("walltime", reason, max(by - self._resources.grace, self._opened + walltime))
        return None

    def _stopped(self) -> Verdict | None:
        """How an attempt ended that has saved and returned before its end; None for one that came to it."""
        steps = [event["step"] for event in read_lines(self._attempt, "events.jsonl") if event["event"] == "stopped"]
        if not steps:
            return None
        asked = stop_requested(self._attempt)
        if asked:
            return Verdict(asked.why, "; ".join(filter(None, [asked.reason, f"saved at step {steps[-1]}"])))
        return Verdict("paused", f"paused at step {steps[-1]}")

    def _judge(self) -> Verdict:
        """The verdict once the driver has ended."""
        path = self._attempt.folder / "outcome.json"
        if path.exists():
            failures = {int(rank): load(failure) for rank, failure in read_json(path)["failures"].items()}
            if not failures:
                return self._stopped() or Verdict("success", missing.reason(self._attempt))
        else:
            told = f"the driver ended with exit code {self._driver.exit_code}\n{self._tail('controller')}"
            failures = {-1: Failure(told)}
        if not answers(os.environ["RAY_ADDRESS"]):
            return Verdict("node_lost", "the Ray head is gone", next(iter(failures.values())).text[-1000:])
        return classify(failures, {rank: self._tail(f"rank-{rank}") for rank in failures})

    def _stuck(self) -> Verdict | None:
        """Whether the head is gone, or nothing moves."""
        self._unanswered = 0 if answers(os.environ["RAY_ADDRESS"]) else self._unanswered + 1
        if self._unanswered >= 3:
            return Verdict("node_lost", "the Ray head is gone", f"nobody listens at {os.environ['RAY_ADDRESS']}")
        silent_s = min(time.monotonic() - self._began, time.time() - self._last_sign())
        if silent_s > self._hang_after_s:
            lines = self._tail("rank-0").strip().splitlines()
            return Verdict("hang", f"nothing was written for {silent_s:.0f} s", lines[-1] if lines else "")
        return None

    def _last_sign(self) -> float:
        """When the workers last wrote something, or showed that they are alive."""
        folder = self._attempt.folder
        signs = [folder / name for name in ("metrics.jsonl", "events.jsonl", "alive")]
        files = [*signs, *(folder / "logs").glob("rank-*.log")]
        return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)

    def _tail(self, name: str) -> str:
        return ending(self._attempt, f"logs/{name}.log", _TAIL).decode(errors="replace")


def _opened(run_dir: Path) -> float:
    """When the first attempt since the run was last (re)opened was claimed (seconds since 1970)."""
    reopened = last_reopened(run_dir)
    return float(next(slot for slot in slots(run_dir) if slot.number > reopened).claim["time"])
