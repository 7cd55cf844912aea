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
from clusters.config import ClusterConfig
from clusters.remote.code import Code
from clusters.remote.link import BROKEN, Link
from runfolder.files import Damaged
from runfolder.site import Refused as RunRefused

READY = "fleetune-answers"  # begins the line by which the far side says that it is there
NO_CODE = 97  # exit code: this version of Fleetune is not there yet
_START_S = 90.0  # until the far side is ready: a cold file system takes long to load Python
_ANSWER_S = 120.0
_SEND_S = 300.0
_CUT = "the connection ended before the answer; repeating is safe"
_LAST_LINES = 3  # of what the far side printed, in a message

# Arguments: root ("" for the default), digest of the code, python. The setup lines come first, as they may put Python
# on the path.
_PLACES = 'root=${1:-${FLEETUNE_HOME:-$HOME/.fleetune}}; case $root in "~/"*) root=$HOME/${root#"~/"};; esac; '
_START = (
    _PLACES + f'code=$root/code/$2; [ -d "$code" ] || exit {NO_CODE}; '
    'FLEETUNE_HOME=$root PYTHONPATH=$code PYTHONUNBUFFERED=1 exec "$3" -P -m clusters.answer'
)
_RECEIVE = (
    _PLACES + 'umask 077; mkdir -p "$root/code" && new=$(mktemp -d "$root/code/.new-XXXXXX") && '
    'tar -xzf - -C "$new" && '
    '{ mv -T "$new" "$root/code/$2" 2>/dev/null || { rm -rf "$new"; [ -d "$root/code/$2" ]; }; }'  # another was first
)
_ERRORS: dict[str, type[Exception]] = {
    "run_refused": RunRefused,
    "request_refused": SubmissionRefused,
    "damaged": Damaged,
    "unreachable": Unreachable,
}


def kind_of(error: Exception) -> str | None:
    """The name by which an error that is part of the interface goes over the link; None for a bug."""
    for name, type_ in _ERRORS.items():
        if isinstance(error, type_):
            return name
    return None


class FarSide:
    """Asks the process there; it is started with the first request, and again after a link was cut."""

    def __init__(self, name: str, link: Link, config: ClusterConfig, code: Code) -> None:
        """The `name` of the cluster is for messages."""
        self.name = name
        self._link = link
        self._config = config
        self._code = code
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this object)
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float = _ANSWER_S) -> Any:
        """The answer to a request; raises what the far side raised, and Unreachable where no answer came."""
        with self._lock:
            if self._process is None:
                self._start()
            try:
                self._write(request)
                reply = json.loads(self._line(timeout_s))
            except (OSError, ValueError) as error:
                raise self._broken(str(error)) from None
        if "error" in reply:
            raise _ERRORS[reply["error"]](reply["message"])
        return reply["answer"]

    def close(self) -> None:
        """End the process there; the connection stays for the next command."""
        process, self._process = self._process, None
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
            self._send_code()
            if not self._begin():
                raise Unreachable(f"cluster {self.name}: Fleetune's code was sent there and is not there")

    def _begin(self) -> bool:
        """Start the process there; False where its code is not there yet."""
        self._unread = b""
        self._stderr.seek(0)
        self._stderr.truncate()
        command = self._command(_START)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr)
        except OSError as error:
            raise Unreachable(f"cluster {self.name}: {command[0]}: {error.strerror}") from None
        config = self._config.model_dump(mode="json")
        try:
            self._write({"cluster": config})
            self._await_ready()
        except (OSError, ValueError) as error:
            if self._exit_code() == NO_CODE:
                self.close()
                return False
            raise self._broken(str(error)) from None
        return True

    def _await_ready(self) -> None:
        """Read until the far side says that it is there; login shells may print before it."""
        deadline = time.monotonic() + _START_S
        while True:
            line = self._line(deadline - time.monotonic())
            if line.startswith(READY.encode()):
                return

    def _send_code(self) -> None:
        try:
            sent = subprocess.run(
                self._command(_RECEIVE), input=self._code.archive(), capture_output=True, timeout=_SEND_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"cluster {self.name}: {error}") from None
        if sent.returncode:
            raise Unreachable(self._explained(sent.stderr, f"code was not taken, exit code {sent.returncode}"))

    def _command(self, script: str) -> list[str]:
        """The process on this machine that runs a script there, behind the site's own lines."""
        config = self._config
        lines = "\n".join([*config.setup, script])
        arguments = [config.root or "", self._code.digest, config.python]
        return self._link.process(["bash", "-c", lines, "fleetune", *arguments])

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
        return Unreachable(self._explained(said, reason))

    def _explained(self, stderr: bytes, reason: str) -> str:
        """One line: the last words of the far side, or the reason where it had none, and what to do."""
        text = stderr.decode(errors="replace")
        stripped = map(str.strip, text.splitlines())
        said = list(filter(None, stripped))
        shown = "; ".join(said[-_LAST_LINES:])
        remedy = self._link.remedy(text)
        return f"cluster {self.name}: {shown or reason}{remedy}"
