"""The machine of a cluster behind its link: scripts that run there, with Fleetune's code sent where it is missing."""

import base64
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from clusters.base import Unreachable
from clusters.checks import Check
from clusters.config import ClusterConfig
from clusters.remote import scripts
from clusters.remote.code import Code
from clusters.remote.link import BROKEN, Link
from clusters.remote.lock import Lock

_SEND_S = 300.0
_CHECKS_S = 300.0
_LAST_LINES = 3  # of what was printed there, in a message
_NEEDS_PYTHON = (
    "; Fleetune needs Python 3.11 or newer there: load one in `setup` of the cluster, "
    "like `module load python/3.11`, or name one that has Fleetune's packages in `python`"
)


class EnvironmentMissing(Unreachable):
    """The environment of a cluster is not made yet; `cluster` is its name."""

    def __init__(self, cluster: str) -> None:
        super().__init__(
            f"cluster {cluster}: the packages that runs need are not there yet; "
            f"have them installed with: fleetune clusters setup {cluster} (--yes: without a question)"
        )
        self.cluster = cluster


class CodeRefused(Unreachable):
    """Fleetune's code could not be written to the root of a cluster."""


class PythonMissing(Unreachable):
    """No Python on a cluster's machine is new enough."""


@dataclass(frozen=True)
class FarMachine:
    """What the clusters file says of a cluster by this name, and the code and the packages that it is to have."""

    name: str
    link: Link
    config: ClusterConfig
    code: Code
    lock: Lock

    def set_up(self, show: Callable[[str], None]) -> None:
        """Have the environment made there, unless it is there; `show` gets each line of the log.

        It goes on there when the link is cut; who repeats this waits for it, and gets the log from its beginning.
        """
        lock = self.lock
        wanted = {
            "requirements": lock.requirements,
            "constraints": lock.constraints,
            "env": self.config.env,
        }
        self._run(scripts.SET_UP, wanted, show)

    def check(self, wanted: Mapping[str, Any]) -> list[Check]:
        """What a look at that machine finds, by one command there (clusters/checkup.py)."""
        lines: list[str] = []
        self._run(scripts.LOOK, wanted, lines.append, _CHECKS_S)
        checks = []
        for plain in json.loads(lines[-1]):  # setup lines may print before it
            checks.append(Check(**plain))
        return checks

    def command(self, script: str) -> list[str]:
        """The process on this machine that runs a script there, behind the site's own lines."""
        config = self.config
        lines = "\n".join([*config.setup, script])
        encoded = base64.b64encode(lines.encode())
        in_one_line = encoded.decode()  # a login shell like tcsh takes no others
        root = config.root or ""
        python = config.python or ""
        code = self.code.digest
        lock = self.lock.digest
        modules = str(self.code.modules)
        arguments = [root, code, python, lock, modules]
        decode = ["bash", "-c", scripts.DECODE, "fleetune", in_one_line]
        return self.link.process([*decode, *arguments])

    def send_code(self) -> None:
        """Have this version of Fleetune there."""
        command = self.command(scripts.RECEIVE)
        try:
            sent = subprocess.run(command, input=self.code.archive(), capture_output=True, timeout=_SEND_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"cluster {self.name}: {error}") from None
        if sent.returncode:
            failure = self.failure(sent.returncode, sent.stderr, f"code was not taken, exit code {sent.returncode}")
            if sent.returncode == BROKEN:
                raise failure
            raise CodeRefused(str(failure))

    def failure(self, code: int | None, stderr: bytes, reason: str) -> Unreachable:
        """What to raise for a script that failed, by its exit code and its words; `reason` where it had none."""
        if code == scripts.NO_ENVIRONMENT:
            return EnvironmentMissing(self.name)
        text = stderr.decode(errors="replace")
        stripped = map(str.strip, text.splitlines())
        said = list(filter(None, stripped))
        shown = "; ".join(said[-_LAST_LINES:])
        if code == scripts.NO_PYTHON:
            return PythonMissing(f"cluster {self.name}: {shown}{_NEEDS_PYTHON}")
        remedy = self.link.remedy(text)
        if "ModuleNotFoundError" in shown:
            remedy = f"; see what is missing there with: fleetune doctor --cluster {self.name}"
        return Unreachable(f"cluster {self.name}: {shown or reason}{remedy}")

    def _run(
        self, script: str, message: Mapping[str, Any], show: Callable[[str], None], timeout_s: float | None = None
    ) -> None:
        """Run a script that is given a message, and show what it prints; raises Unreachable where it fails."""
        with tempfile.TemporaryFile() as stderr:
            code = self._exit_code(script, message, show, stderr, timeout_s)
            if code == scripts.NO_CODE:
                self.send_code()
                code = self._exit_code(script, message, show, stderr, timeout_s)
            if code:
                stderr.seek(0)
                reason = f"exit code {code}"
                if code == BROKEN or code < 0:
                    reason = "the connection ended before the answer; repeating is safe"
                raise self.failure(code, stderr.read(), reason)

    def _exit_code(
        self,
        script: str,
        message: Mapping[str, Any],
        show: Callable[[str], None],
        stderr: IO[bytes],
        timeout_s: float | None,
    ) -> int:
        """Run a script once."""
        command = self.command(script)
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(message).encode())
            stdin.seek(0)
            try:
                process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)
            except OSError as error:
                raise Unreachable(f"cluster {self.name}: {command[0]}: {error.strerror}") from None
        timer = threading.Timer(timeout_s or threading.TIMEOUT_MAX, process.kill)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                show(line.decode(errors="replace").rstrip())
            return process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
