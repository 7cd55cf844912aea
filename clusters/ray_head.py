"""The Ray head of the local cluster: its own temporary folder, ports and token, on loopback alone."""

import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clusters import process
from clusters.ray_start import head_options, node_options, ray_command, ray_environment, write_token, write_whole

START_S = 180.0  # after this long without an answer a head is taken for dead
_LOOPBACK = "127.0.0.1"
_SHORT_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")  # where a path leaves space for the names of Ray's sockets
# The path of a socket may have 107 bytes (103 on macOS), and multiprocessing adds some 35 to TMPDIR.
_LONGEST_TMPDIR = 60
_REASON = re.compile(r"\w(Error|Exception)\b|Check failed|[Cc]annot|[Ff]ailed|No space")


@dataclass
class Backoff:
    """Backoff of a process that keeps dying: started again after 1, 2, 4 ... 30 s, at once when it lived for long."""

    quick_s: float = 5.0
    _deaths: int = 0
    _began: float | None = None
    _next: float = 0.0

    def began(self) -> None:
        """Note a start of the process."""
        self._began = time.monotonic()

    def succeeded(self) -> None:
        """Note that it does its work: its next death counts as the first."""
        self._began = None
        self._deaths = 0

    def ready(self) -> bool:
        """Asked while it is dead: whether to start it now."""
        if self._began is not None:
            lived_s = time.monotonic() - self._began
            self._note_death(lived_s)
            self._began = None
        return time.monotonic() >= self._next

    def _note_death(self, lived_s: float) -> None:
        """Set the time of the next start."""
        delay_s = 0.0
        if lived_s < self.quick_s:
            self._deaths += 1
            delay_s = min(30.0, 2.0 ** (self._deaths - 1))
        else:
            self._deaths = 0
        self._next = time.monotonic() + delay_s


@dataclass(frozen=True)
class FailedStarts:
    """Starts in a row that came to nothing, and the last words of the latest."""

    starts: int
    reason: str


@dataclass
class Head:
    """One Ray head per state folder. `keep` is called again and again."""

    folder: Path
    _backoff: Backoff = field(default_factory=lambda: Backoff(START_S))
    _answered: float = field(default_factory=time.monotonic)
    _starting: bool = False  # one was started that has not answered yet
    _log_offset: int = 0  # where the output of that one begins

    @property
    def lock(self) -> Path:
        """Held by the head while it lives."""
        return self.folder / "ray.lock"

    @property
    def log(self) -> Path:
        """The output of the heads, one after the other."""
        return self.folder / "ray.log"

    @property
    def short_folder(self) -> Path | None:
        """A folder of ours alone with a short path, under a name that nobody can guess and take; None before it."""
        try:
            folder = Path((self.folder / "ray.folder").read_text())
            status = folder.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        return folder

    @property
    def ray_folder(self) -> Path | None:
        """The folder that Ray keeps all of its files in."""
        folder = self.short_folder
        return folder and folder / "ray"

    def address(self) -> str | None:
        """Where the head says that it is; None while it has not said so."""
        folder = self.ray_folder
        if folder is None:
            return None
        try:
            address = (folder / "ray_current_cluster").read_text()
        except FileNotFoundError:
            return None
        return address.strip() or None

    def failed_starts(self) -> FailedStarts | None:
        """The starts that failed since a head last answered; None when there is none."""
        try:
            text = (self.folder / "ray.failed").read_text()
        except FileNotFoundError:
            return None
        return FailedStarts(**json.loads(text))

    def keep(self) -> str | None:
        """The address of a head that answers; None while one starts."""
        if process.owner(self.lock) is None:
            if self._starting:
                self._note_failure(self._death_reason())
            if self._backoff.ready():
                self._start()
            return None
        address = self.address()
        if address and answers(address):
            self._answered = time.monotonic()
            self._starting = False
            self._backoff.succeeded()
            self.forget()
            return address
        if time.monotonic() - self._answered > START_S:
            process.end(self.lock)
        return None

    def forget(self) -> None:
        """Forget the failures so far, so that they are counted anew."""
        (self.folder / "ray.failed").unlink(missing_ok=True)

    def end(self) -> None:
        """Kill the head and all of its processes."""
        process.end(self.lock)
        if self.short_folder:
            shutil.rmtree(self.short_folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What Ray's processes and those that connect to the head need."""
        return {
            **ray_environment(self._token()),
            # Without this Ray turns 127.0.0.1 into the machine's own address, and listens there.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            **self._short_tmpdir(),
        }

    def _start(self) -> None:
        process.end(self.lock)
        self._backoff.began()
        self._answered = time.monotonic()
        self._log_offset = self.log.stat().st_size if self.log.exists() else 0
        try:
            ray_folder = self._empty_folder()
            process.spawn(self.lock, self._command(ray_folder), os.environ | self.environment(), self.log)
        except OSError as error:
            self._note_failure(str(error))
        else:
            self._starting = True

    def _empty_folder(self) -> Path:
        """An empty folder for Ray; raises OSError where there is no place for one."""
        if self.short_folder is None:
            writable = [parent for parent in _SHORT_PARENTS if os.access(parent, os.W_OK | os.X_OK)]
            parent = writable[0] if writable else None
            short_folder = tempfile.mkdtemp(prefix="fleetune-", dir=parent)
            write_whole(self.folder / "ray.folder", short_folder)
        ray_folder = self.ray_folder
        assert ray_folder
        shutil.rmtree(ray_folder, ignore_errors=True)
        ray_folder.mkdir(mode=0o700)
        return ray_folder

    def _note_failure(self, reason: str) -> None:
        """Note a start that came to nothing."""
        self._starting = False
        before = self.failed_starts()
        starts = before.starts + 1 if before else 1
        failure = FailedStarts(starts, reason)
        write_whole(self.folder / "ray.failed", json.dumps(asdict(failure)))

    def _death_reason(self) -> str:
        """Of all that a head which died has written, the last line that looks like a reason, else the last line."""
        lines = []
        for text in self._outputs():
            lines += [line.strip() for line in text.splitlines() if line.strip()]
        reasons = [line for line in lines if _REASON.search(line)]
        candidates = reasons or lines or ["it ended without a word"]
        return candidates[-1][:500]

    def _outputs(self) -> Iterator[str]:
        """What the head wrote, then what its parts wrote: theirs is the cause."""
        if self.log.exists():
            data = self.log.read_bytes()
            yield data[self._log_offset :].decode(errors="replace")
        folder = self.ray_folder
        if folder is None:
            return
        logs = folder / "session_latest" / "logs"
        for path in sorted(logs.glob("*.err"), key=lambda path: path.stat().st_mtime):
            yield path.read_text(errors="replace")

    def _short_tmpdir(self) -> dict[str, str]:
        """TMPDIR by a short name where its own is too long for the path of a socket in it."""
        tmpdir = os.environ.get("TMPDIR", "")
        folder = self.short_folder
        if len(os.fsencode(tmpdir)) <= _LONGEST_TMPDIR or folder is None:
            return {}
        link = folder / "tmp"
        if not link.is_symlink():
            link.symlink_to(tmpdir)
        return {"TMPDIR": str(link)}

    def _command(self, ray_folder: Path) -> list[str]:
        options = node_options(_LOOPBACK, ray_folder)
        options |= head_options(_LOOPBACK, 0)
        return ray_command(options, ["--head", "--no-monitor", "--disable-usage-stats"])

    def _token(self) -> Path:
        path = self.folder / "ray_token"
        if not path.exists():
            write_token(path)
        return path


def answers(address: str) -> bool:
    """Whether somebody listens at an address host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False
