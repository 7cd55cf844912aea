"""SLURM's commands as a small model, for trials by the thousand: what slurmctld takes, loses, delays and forgets.

It stands in for `subprocess.run` where clusters/ runs a command of SLURM, or a controller. Its state is a file, so
that it outlives who asks. A tick is a command: jobs start, end and are forgotten by ticks, so a trial's seed decides
what happens.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clusters import allocation
from runfolder import chain

TimeoutExpired = subprocess.TimeoutExpired
CANCELLED = {"state": "cancelled", "reason": "cancelled by request"}
REFUSAL = "Invalid partition name specified"
# What sbatch may do, beside taking the job and saying so.
MISHAPS = ("away", "timeout", "slow", "late", "killed", "no answer", "lost answer", "restart")
_AWAY = "Unable to contact slurm controller (connect failure)"
_LOST = "Batch job submission failed: Socket timed out on send/recv operation"
_FORGOTTEN_AFTER = 4  # ticks after its start; it has ended after two
_ENDING_TICKS = 12  # of a job that is lost
_SLOW_S = 0.02  # long enough for who asked to be gone, and to ask again


class SlurmModel:
    """The slurmctld of one trial after the other, whose state is in a folder."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "slurm.json"
        self._lock = folder / "slurm.lock"
        self.work = folder / "work"  # a line with its id for each job that did work

    def begin(self, **plan: object) -> None:
        """Start with `mishaps`, what happens to each sbatch in turn, and `starts`, the ticks at which a job starts.

        A job that is taken late is so by `lateness` ticks. At `failures` a job is lost before it begins, and is at
        its end for some ticks. SLURM may have a reason to take none ever (`refuses`), which sbatch --test-only tells
        (`tells`) or not, or to take no second one (`takes_one`).
        """
        self.work.unlink(missing_ok=True)
        state = {"tick": 0, "away": 0, "jobs": [], "late": [], "asked": 0, "taken": 0, **plan}
        self._state.write_text(json.dumps(state))

    def run(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        """What subprocess.run gives for a command of SLURM."""
        with self._ticking() as state:
            if state["away"] > 0:
                state["away"] -= 1
                return _failed(command, _AWAY)
            if command[0] == "sinfo":
                return _said(command, "idle (null) gpu:0 0/4/0/4\n")
            if command[0] == "sacct":
                return _said(command, "")  # a site without accounting
            full = state["takes_one"] and state["taken"] > 0
            if command[0] == sys.executable:
                chain.close(Path(command[-1]), CANCELLED)  # as a controller does
                return _said(command, "")
            if command == ["sbatch", "--test-only"]:
                if (state["refuses"] and state["tells"]) or full:
                    return _failed(command, f"allocation failure: {REFUSAL}")
                return subprocess.CompletedProcess(command, 0, "", "sbatch: Job 1 to start at 2026-01-01T00:00:00\n")
            if command[0] == "squeue":
                return _said(command, "".join(f"{_row(job)}\n" for job in state["jobs"]))
            state["asked"] += 1
            mishap = state["mishaps"].pop(0) if state["mishaps"] else ""
            if mishap == "refused" or full:
                return _failed(command, f"Batch job submission failed: {REFUSAL}")
            script = Path(command[-1]).read_text()
            accept = not state["refuses"] and mishap in ("", "slow", "no answer", "lost answer")
            if accept:
                _accept(state, script)
            if mishap in ("late", "killed") and not state["refuses"]:
                state["late"].append([state["tick"] + state["lateness"], script])
            if mishap == "restart":
                state["away"] = 2
            job_id = state["taken"]
        return _answer(command, mishap, job_id, state["refuses"])

    def drain(self, work_together: "Callable[[list[dict[str, Any]]], None]") -> list[str]:
        """Let all that is queued run, at the same time; gives the ids of the jobs that did work."""
        with self._ticking() as state:
            for _, script in state["late"]:
                _accept(state, script)
            state["late"] = []
            work_together([job for job in state["jobs"] if _waits(job)])
        return self.worked()

    def worked(self) -> list[str]:
        """The ids of the jobs that did work, in the order in which they did."""
        return self.work.read_text().split() if self.work.exists() else []

    @property
    def asked(self) -> int:
        """How often it was asked to take a job."""
        with self._lock.open("w") as lock:  # a far side whose link was cut may go on
            fcntl.flock(lock, fcntl.LOCK_EX)
            asked: int = json.loads(self._state.read_text())["asked"]
        return asked

    @property
    def taken(self) -> int:
        """How many jobs were ever taken."""
        taken: int = json.loads(self._state.read_text())["taken"]
        return taken

    def do(self, job: dict[str, Any]) -> None:
        """What a batch job does: work, if it has its submission, and close the run."""
        run_dir = Path(job["run_dir"])
        if allocation.claim(run_dir, job["name"], job["id"]):
            with self.work.open("a") as stream:
                stream.write(f"{job['id']}\n")
            chain.close(run_dir, {"state": "succeeded"})

    @contextmanager
    def _ticking(self) -> Iterator[dict[str, Any]]:
        """The state, for one command at a time, a tick later; it is kept."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads(self._state.read_text())
            state["tick"] += 1
            tick = state["tick"]
            for late in [late for late in state["late"] if late[0] <= tick]:
                state["late"].remove(late)
                _accept(state, late[1])
            waiting = [job for job in state["jobs"] if _waits(job)]
            if tick in state["starts"] and waiting:
                waiting[0]["started"] = tick
                self.do(waiting[0])
            if tick in state["failures"] and waiting:
                waiting[-1]["failed"] = tick  # as where it was cancelled, or could not be started
            for job in state["jobs"]:
                job["state"] = _state_of(job, tick)
            state["jobs"] = [job for job in state["jobs"] if job["state"]]
            yield state
            self._state.write_text(json.dumps(state))


def _accept(state: dict[str, Any], script: str) -> None:
    """Take a job, whose name and command are in its script."""
    state["taken"] += 1
    *_, run_dir, name = shlex.split(script.splitlines()[-1])
    found = re.search("^#SBATCH --job-name=(.*)$", script, re.MULTILINE)
    assert found and found[1] == name
    job = {"id": str(state["taken"]), "name": name, "run_dir": run_dir, "state": "PENDING"}
    job |= {"started": None, "failed": None}
    state["jobs"].append(job)


def _waits(job: dict[str, Any]) -> bool:
    return job["started"] is None and job["failed"] is None


def _state_of(job: dict[str, Any], tick: int) -> str:
    """The state of a job at a tick; empty where it is forgotten."""
    if job["failed"] is not None:
        return "COMPLETING" if tick - job["failed"] < _ENDING_TICKS else ""
    if job["started"] is None:
        return "PENDING"
    since = tick - job["started"]
    return "RUNNING" if since < 2 else "COMPLETED" if since < _FORGOTTEN_AFTER else ""


def _row(job: dict[str, Any]) -> str:
    return f"{job['id']}|{job['state']}|None|N/A|n/a||{job['name']}"


def _answer(command: list[str], mishap: str, job_id: int, refuses: bool) -> "subprocess.CompletedProcess[str]":
    """What sbatch says, if it comes to that."""
    if mishap == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mishap in ("timeout", "late", "no answer"):
        raise TimeoutExpired(command, 60)
    if mishap in ("away", "restart"):
        return _failed(command, _AWAY)
    if mishap == "slow":
        time.sleep(_SLOW_S)
    if mishap == "lost answer":
        return _failed(command, _LOST)
    return _failed(command, f"Batch job submission failed: {REFUSAL}") if refuses else _said(command, f"{job_id}\n")


def _said(command: list[str], text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess(command, 0, text, "")


def _failed(command: list[str], text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: error: {text}\n")
