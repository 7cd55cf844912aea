"""One attempt at a service: its server is started, its address is written down, and it is watched until it ends."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

from clusters.run_files import last_line
from orchestrator.endings import walltime_is_over, walltime_of_run, why_told
from orchestrator.served import REFUSED
from orchestrator.verdict import Verdict
from runfolder.chain import Attempt
from runfolder.files import list_names
from runfolder.requests import cancel_requested, opened_at
from runfolder.service import ServiceSpec

SERVING = re.compile(rb"^serving on http://\S+:(\d{1,5})$", re.MULTILINE)
_LOG = "logs/rank-0.log"
_SERVED = "served"  # a file of an attempt that came to serve
_WATCH_S = 1.0
_HEALTH_BYTES = 4096  # of what a server says of its health
_HEALTH_S = 10.0  # between two questions whether it is well
_LONGER_S = 10.0  # beside the grace, for a server that drains
_LATE_S = 60.0  # before the end of an allocation, beside the grace, from when on its end is meant


class ServedAttempt:
    """The server of one attempt."""

    def __init__(self, attempt: Attempt, service: ServiceSpec, told: threading.Event) -> None:
        """`told` is set when whoever started this controller wants it to end."""
        self._attempt = attempt
        self._service = service
        self._told = told
        self._port: int | None = None
        self._asked_at = time.monotonic()

    def until_end(self) -> Verdict:
        """How the attempt ended; raises Fenced when another one took over."""
        process = self._started()
        try:
            while process.poll() is None:
                self._attempt.check(cached=True)
                self._note_address()
                if verdict := self._must_end():
                    self._drain(process)
                    return verdict
                time.sleep(_WATCH_S)
            return self._ended_by_itself(process.returncode)
        finally:
            process.kill()
            process.wait()

    def _started(self) -> "subprocess.Popen[bytes]":
        """The process of the server, which lives no longer than this one: it reads what we never write."""
        log = self._attempt.folder / _LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "orchestrator.served", str(self._attempt.run_dir)]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )

    def _note_address(self) -> None:
        """Write down where the server answers, once it says so."""
        if self._port is not None:
            return
        said = SERVING.search((self._attempt.folder / _LOG).read_bytes())
        if said:
            self._port = int(said[1])
            (self._attempt.folder / _SERVED).touch()
            self._attempt.event("serving", address=f"http://{socket.gethostname()}:{self._port}")

    def _must_end(self) -> Verdict | None:
        """The verdict on an attempt that must be ended now, else None."""
        if cancel_requested(self._attempt.run_dir):
            return Verdict("cancelled", "")
        resources = self._service.resources
        if self._told.is_set():
            why, reason = why_told(resources.grace + _LATE_S)
            return Verdict(why, reason)
        walltime = walltime_of_run(resources)
        if walltime is not None and time.time() > opened_at(self._attempt.run_dir) + walltime:
            return Verdict("walltime", walltime_is_over(walltime))
        if self._has_failed():
            return Verdict("node_lost", "the engine has failed", last_line(self._attempt.folder / _LOG))
        return None

    def _has_failed(self) -> bool:
        """Whether the server says that its engine has failed; one that is slow to answer has not."""
        if self._port is None or time.monotonic() - self._asked_at < _HEALTH_S:
            return False
        self._asked_at = time.monotonic()
        return engine_failed(self._port)

    def _drain(self, process: "subprocess.Popen[bytes]") -> None:
        """Have the server end its answers, and end."""
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(self._service.resources.grace + _LONGER_S)

    def _ended_by_itself(self, code: int) -> Verdict:
        """The verdict on a server that ended though nobody wanted it to."""
        line = last_line(self._attempt.folder / _LOG)
        if code == REFUSED:
            return Verdict("user_error", line, line)
        return Verdict("node_lost", f"the server ended with exit code {code}", line)


def engine_failed(port: int) -> bool:
    """Whether the server on a port of this machine says that its engine has failed."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_HEALTH_S)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read(_HEALTH_BYTES))
        return bool(answer["error"]["code"] == "engine_failed")
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return False
    finally:
        connection.close()


def has_served(attempt: Attempt) -> bool:
    """Whether an attempt at a service came to serve, which is how far one gets."""
    return _SERVED in list_names(attempt.folder)
