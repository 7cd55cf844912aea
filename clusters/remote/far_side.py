"""The far side of a link: a process there that answers requests, one line of JSON for each, as long as we ask.

It is `python -m clusters.answer` in the copy of this project that lies there by its digest; where there is none yet,
the copy is sent first. What happened to a request whose answer did not come is not known, and repeating it is safe.
"""

import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from clusters.base import SubmissionRefused, Unreachable
from clusters.remote import scripts
from clusters.remote.link import BROKEN
from clusters.remote.machine import FarMachine
from runfolder.files import Damaged
from runfolder.site import Refused as RunRefused

READY = "fleetune-answers"  # begins the line by which the far side says that it is there
AT_WORK = "fleetune-works"  # the line by which it says that it works on an answer, now and then
_START_S = 90.0  # until the far side is ready: a cold file system takes long to load Python
_ANSWER_S = 120.0  # without an answer, or a sign of work on it
_CUT = "the connection ended before the answer"


class FarFileError(Unreachable):
    """A file on the machine of a cluster could not be read or written: its disk is full, or somebody else's."""


_ERRORS: dict[str, type[Exception]] = {
    "run_refused": RunRefused,
    "request_refused": SubmissionRefused,
    "damaged": Damaged,
    "unreachable": Unreachable,
    "file": OSError,
}


def kind_of(error: Exception) -> str | None:
    """The name by which an error that is part of the interface goes over the link; None for a bug."""
    for name, type_ in _ERRORS.items():
        if isinstance(error, type_):
            return name
    return None


def words_of(error: Exception) -> str:
    """An error in the words that go over the link: of a file, its path and what is wrong with it."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class FarSide:
    """Asks the process there; it is started with the first request, and again after a link was cut."""

    def __init__(self, machine: FarMachine) -> None:
        """The process runs on this machine."""
        self.machine = machine
        self.name = machine.name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this object)
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float = _ANSWER_S) -> Any:
        """The answer to a request; raises what the far side raised, and Unreachable where no answer came."""
        with self._lock:
            if not self._is_ready:
                self._start()
            try:
                self._write(request)
                line = self._line(timeout_s)
                while line == AT_WORK.encode():
                    line = self._line(timeout_s)
                reply = json.loads(line)
            except (OSError, ValueError) as error:
                raise self._broken(str(error)) from None
            except BaseException:
                self.close()  # or the answer would be taken for that of the next request
                raise
        if reply.get("error") == "file":
            raise FarFileError(f"cluster {self.name}: {reply['message']}")
        if "error" in reply:
            raise _ERRORS[reply["error"]](reply["message"])
        return reply["answer"]

    def start(self) -> None:
        """Start the process there, unless it was started before; raises EnvironmentMissing."""
        with self._lock:
            if not self._is_ready:
                self._start()

    def expect(self) -> None:
        """Begin to start the process there; who asks first waits for it, and is told what fails."""
        with self._lock, suppress(Unreachable):
            if self._process is None:
                self._launch()

    def close(self) -> None:
        """End the process there; the connection stays for the next command."""
        process, self._process = self._process, None
        self._is_ready = False
        if process is None:
            return
        assert process.stdin and process.stdout
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()

    def _start(self) -> None:
        """Start the process there, with its code sent first where that is missing."""
        if not self._begin():
            self.machine.send_code()
            if not self._begin():
                code = f"code/{self.machine.code.digest}"
                raise Unreachable(
                    f"cluster {self.name}: Fleetune's code was sent there and is not whole; remove {code} of its root"
                )

    def _begin(self) -> bool:
        """Start the process there; False where its code is not there yet."""
        if self._process is None:
            self._launch()
        config = self.machine.config.model_dump(mode="json")
        try:
            self._write({"cluster": config})
            self._await_ready()
        except (OSError, ValueError) as error:
            if self._exit_code() == scripts.NO_CODE:
                self.close()
                return False
            raise self._broken(str(error)) from None
        self._is_ready = True
        return True

    def _launch(self) -> None:
        """Start the process here that starts the one there."""
        self._unread = b""
        self._stderr.seek(0)
        self._stderr.truncate()
        command = self.machine.command(scripts.ANSWER)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr)
        except OSError as error:
            raise Unreachable(f"cluster {self.name}: {command[0]}: {error.strerror}") from None

    def _await_ready(self) -> None:
        """Read until the far side says that it is there; login shells may print before it."""
        deadline = time.monotonic() + _START_S
        while True:
            line = self._line(deadline - time.monotonic())
            if line.startswith(READY.encode()):
                return

    def _write(self, request: Mapping[str, Any]) -> None:
        assert self._process and self._process.stdin
        text = json.dumps(request) + "\n"
        try:
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise OSError(_CUT) from None

    def _line(self, timeout_s: float) -> bytes:
        """The next line of the far side; raises OSError where it ends, or says nothing for so long."""
        assert self._process and self._process.stdout
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        parts = [self._unread]
        while b"\n" not in parts[-1]:
            left_s = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([output], [], [], left_s)
            if not readable:
                raise OSError(f"no answer within {timeout_s:.0f} s")
            data = os.read(output, 1 << 20)
            if not data:
                raise OSError(_CUT)
            parts.append(data)
        line, _, self._unread = b"".join(parts).partition(b"\n")
        return line

    def _exit_code(self) -> int | None:
        assert self._process
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None

    def _broken(self, reason: str) -> Unreachable:
        """Give the process up; what to say of it."""
        code = self._exit_code() if reason == _CUT else None
        self.close()
        self._stderr.seek(0)
        said = self._stderr.read()
        if code not in (None, 0, BROKEN):
            reason = f"exit code {code}"
        return self.machine.failure(code, said, reason)
