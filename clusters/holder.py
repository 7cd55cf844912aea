"""Who holds a lock, said so that nobody takes another process for it: not on another host, nor after a reboot."""

import json
import os
import socket
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_ZOMBIE = "Z"


@dataclass(frozen=True)
class Holder:
    """A process. Its number means something within one boot of one machine (and one container) alone: `boot_id`.

    `started` is the timestamp of its start as that system counts it: numbers are given again.
    """

    host: str
    boot_id: str
    pid: int
    started: str

    @property
    def here(self) -> bool:
        """Whether the number would be that of a process of this system."""
        return self.boot_id == boot_id()

    @property
    def lives(self) -> bool:
        """Whether the process runs on this system."""
        if not self.here:
            return False
        return start_of(self.pid) == self.started

    @property
    def replaced(self) -> bool:
        """Whether another process of this system has the number now."""
        if not self.here:
            return False
        started = start_of(self.pid)
        return started is not None and started != self.started

    def dump(self) -> bytes:
        """The holder as bytes of JSON, which `parse_holder` reads."""
        text = json.dumps(asdict(self))
        return text.encode()


def current_holder() -> Holder:
    """The holder that this process would be."""
    pid = os.getpid()
    started = start_of(pid) or ""
    return Holder(socket.gethostname(), boot_id(), pid, started)


def parse_holder(data: bytes) -> Holder | None:
    """The holder that a lock file names; None when it names none."""
    try:
        fields = json.loads(data)
        if isinstance(fields, int):  # a bare process id, as Fleetune wrote it before: of whatever host
            return Holder("an unknown host", "", fields, "")
        return Holder(**fields)
    except (ValueError, TypeError):
        return None


@cache
def boot_id() -> str:
    """What tells this boot of this machine from all others, and a container from its host; else the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return _boot_of_macos() or socket.gethostname()


def start_of(pid: int) -> str | None:
    """When a process of this system started; None when there is none of that number, or it has ended."""
    if not Path("/proc/self/stat").exists():
        return _start_on_macos(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The fields behind the name, which may hold anything: the third is the state, the 22nd the start (proc(5)).
    fields = stat.rpartition(")")[2].split()
    if fields[0] == _ZOMBIE:
        return None
    return fields[19]


def _boot_of_macos() -> str:
    try:
        completed = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return completed.stdout.strip()


def _start_on_macos(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return str(process.create_time())
    except psutil.NoSuchProcess:
        return None
