"""Watching an attempt: the driver process that holds its workers, and all that can end it."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from clusters.ray_head import answers
from orchestrator.endings import walltime_is_over, walltime_of_run, why_told
from orchestrator.failure import Failure, load_failure
from orchestrator.verdict import Verdict, classify
from runfolder.appended import read_ending, read_lines
from runfolder.chain import Attempt
from runfolder.files import read_json
from runfolder.record import load_any_job
from runfolder.requests import (
    Stop,
    cancel_requested,
    cancel_saves,
    opened_at,
    request_stop,
    stop_requested,
)
from runfolder.shapes import OUTCOME
from trainer.omissions import omissions_line

_DRIVER_POLL_S = 0.25  # between two looks at the driver process
_LOOK_S = 1.0  # between two looks at the run folder, which may be on a file system that many share
_TAIL_BYTES = 16_384  # at the end of a log, in which evidence is looked for
_EARLIEST_WARNING_S = 120.0  # before the grace of a job: schedulers warn early rather than late
_UNANSWERED_LIMIT = 3  # looks in a row at which Ray's head does not answer
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
        program = [sys.executable, "-P", "-m", "orchestrator.driver"]
        environment = dict(os.environ)
        environment.update(_DRIVER_ENVIRONMENT)
        command = [*program, str(run_dir)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process; None while it runs."""
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
        self._resources = load_any_job(attempt.run_dir).resources
        self._hang_after_s = float(os.environ.get("FLEETUNE_HANG_AFTER", "1800"))
        self._signs = self._signs_of_life()
        self._moved_at = time.monotonic()
        self._opened_at = opened_at(attempt.run_dir)
        self._unanswered = 0

    def until_end(self) -> Verdict:
        """How the attempt ended; raises Fenced when another one took over."""
        looked_at = 0.0
        while self._driver.exit_code is None:
            if time.monotonic() - looked_at >= _LOOK_S:
                looked_at = time.monotonic()
                if verdict := self._must_end_now():
                    return verdict
            time.sleep(_DRIVER_POLL_S)
        self._attempt.check()
        return self._verdict_after_driver()

    def _must_end_now(self) -> Verdict | None:
        """The verdict on an attempt that must be ended now, else None; asks it to save and end if that can wait."""
        self._attempt.check(cached=True)
        if cancel_requested(self._attempt.run_dir) and not cancel_saves(self._attempt.run_dir):
            return Verdict("cancelled", "")
        if stop := self._stop_to_request():
            request_stop(self._attempt, stop)
        requested = stop_requested(self._attempt)
        if requested and time.time() > requested.deadline:
            late = f"no checkpoint within {self._resources.grace} s"
            return _verdict_on_stop(requested, late)
        return self._head_lost() or self._hung()

    def _stop_to_request(self) -> Stop | None:
        """Whether the attempt is to save and end, and why."""
        grace = self._resources.grace
        deadline = time.time() + grace
        if self._told.is_set():
            why, reason = why_told(grace + _EARLIEST_WARNING_S)
            return Stop(why, reason, deadline)
        if cancel_saves(self._attempt.run_dir):
            return Stop("cancelled", "", deadline)
        walltime = walltime_of_run(self._resources)
        if walltime is None:
            return None
        end = self._opened_at + walltime
        reason = walltime_is_over(walltime)
        if time.time() > end:  # it was over when the attempt began: that has its grace all the same
            return Stop("walltime", reason, deadline)
        if time.time() > end - min(grace, walltime / 2):
            return Stop("walltime", reason, end)
        return None

    def _verdict_after_driver(self) -> Verdict:
        """The verdict once the driver has ended."""
        failures = self._failures()
        if not failures:
            return self._verdict_on_saved() or Verdict("success", omissions_line(self._attempt))
        if not answers(os.environ["RAY_ADDRESS"]):
            first = next(iter(failures.values()))
            return Verdict("node_lost", "the Ray head is gone", first.text[-1000:])
        tails = {rank: self._tail(f"rank-{rank}") for rank in failures}
        return classify(failures, tails)

    def _failures(self) -> dict[int, Failure]:
        """What workers raised, by rank, as the driver left it; rank -1 where it left nothing."""
        path = self._attempt.folder / "outcome.json"
        if not path.exists():
            end = f"the driver ended with exit code {self._driver.exit_code}"
            tail = self._tail("controller")
            return {-1: Failure(f"{end}\n{tail}")}
        outcome = read_json(path, OUTCOME)
        failures = {}
        for rank, record in outcome["failures"].items():
            failures[int(rank)] = load_failure(record)
        return failures

    def _verdict_on_saved(self) -> Verdict | None:
        """How an attempt ended that has saved and returned before its end; None for one that came to it."""
        events = read_lines(self._attempt, "events.jsonl")
        stops = []
        for event in events:
            if event["event"] == "stopped":
                stops.append(event)
        if not stops:
            return None
        step = stops[-1]["step"]
        requested = stop_requested(self._attempt)
        if requested:
            return _verdict_on_stop(requested, f"saved at step {step}")
        return Verdict("paused", f"paused at step {step}")

    def _head_lost(self) -> Verdict | None:
        """The verdict where Ray's head has not answered a few times in a row."""
        address = os.environ["RAY_ADDRESS"]
        if answers(address):
            self._unanswered = 0
        else:
            self._unanswered += 1
        if self._unanswered >= _UNANSWERED_LIMIT:
            return Verdict("node_lost", "the Ray head is gone", f"nobody listens at {address}")
        return None

    def _hung(self) -> Verdict | None:
        """The verdict where nothing has moved for long, by this process's clock: the file server's may differ."""
        signs = self._signs_of_life()
        if signs != self._signs:
            self._signs = signs
            self._moved_at = time.monotonic()
        silent_s = time.monotonic() - self._moved_at
        if silent_s > self._hang_after_s:
            lines = self._tail("rank-0").strip().splitlines()
            last_line = lines[-1] if lines else ""
            return Verdict("hang", f"nothing was written for {silent_s:.0f} s", last_line)
        return None

    def _signs_of_life(self) -> dict[Path, tuple[int, int]]:
        """What changes when workers write something, or show that they are alive: times and sizes of files."""
        folder = self._attempt.folder
        paths = []
        for name in ("metrics.jsonl", "events.jsonl", "alive"):
            paths.append(folder / name)
        paths.extend(folder.glob("logs/rank-*.log"))
        signs = {}
        for path in paths:
            with suppress(FileNotFoundError):
                status = path.stat()
                signs[path] = (status.st_mtime_ns, status.st_size)
        return signs

    def _tail(self, name: str) -> str:
        """The end of a log of this attempt."""
        data = read_ending(self._attempt, f"logs/{name}.log", _TAIL_BYTES)
        return data.decode(errors="replace")


def _verdict_on_stop(stop: Stop, outcome: str) -> Verdict:
    """The verdict on an attempt that was asked to save and end, with what came of that."""
    reasons = filter(None, [stop.reason, outcome])
    reason = "; ".join(reasons)
    return Verdict(stop.why, reason)
