"""Detached processes that hold a lock on a file as long as they live, on a local disk.

The lock (flock) is inherited from who starts the process, so there is no moment in which it runs without holding it,
and it falls when the process dies, however it dies. The file holds the process id. Each process leads a session of
its own, by which everything that it started is found.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fleetune_start import unshadowed

_LOCK = "FLEETUNE_LOCK_DESCRIPTOR"
_KILL_S = 10.0  # a process that is stuck in a driver does not die; nobody waits for it for ever
_PATIENCE_S = 0.3  # others probe the lock, or start the process, for milliseconds


def spawn(lock: Path, command: Sequence[str], environment: Mapping[str, str], log: Path) -> bool:
    """Start a process that holds `lock`, its output appended to `log`; False when one holds it already."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _take(descriptor):
            return False
        os.ftruncate(descriptor, 0)
        with log.open("ab") as output:
            subprocess.Popen(
                command,
                env={**unshadowed(environment), _LOCK: str(descriptor)},
                cwd="/",  # never a folder of the user: Ray puts it on the workers' sys.path
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[descriptor],
                # Written by the child itself: who dies between fork and a note of the parent leaves no gap.
                preexec_fn=lambda: os.pwrite(descriptor, str(os.getpid()).encode(), 0),
            ).returncode = 0  # nobody waits for it: it outlives us, or `reap` collects it
        return True
    finally:
        os.close(descriptor)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock that was set free; raises BlockingIOError when somebody took it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _take(descriptor):
            raise BlockingIOError(f"{lock} is held by another process")
        os.ftruncate(descriptor, 0)
        yield
    finally:
        os.close(descriptor)


def release() -> None:
    """Let go of the lock that this process was started with."""
    os.close(int(os.environ[_LOCK]))


def owner(lock: Path) -> int | None:
    """The id of the process that holds the lock; None when nobody does."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not _try(descriptor, fcntl.LOCK_SH):
            if recorded := _recorded(descriptor):
                return recorded
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        return None
    finally:
        os.close(descriptor)


def end(lock: Path) -> None:
    """Kill the process that holds the lock, and what is left of its session; returns when all of it is gone."""
    if not lock.exists():
        return
    holder = owner(lock)
    with lock.open() as stream:
        pid = holder or _recorded(stream.fileno())
    # The system gives no number to a new process while a session of that number has members,
    # so a living leader without the lock is a stranger, and members without a leader are ours.
    if pid is None or (holder is None and _lives(pid)):
        return
    deadline = time.monotonic() + _KILL_S
    while (members := _session(pid)) and time.monotonic() < deadline:
        for member in members:
            _kill(member)
        time.sleep(0.05)


def reap() -> None:
    """Collect the children that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _take(descriptor: int) -> bool:
    """Lock a file for the process to be; others that only probe it are waited for."""
    deadline = time.monotonic() + _PATIENCE_S
    while not _try(descriptor, fcntl.LOCK_EX):
        pid = _recorded(descriptor)
        if (pid and _lives(pid)) or time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _try(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recorded(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _session(leader: int) -> list[int]:
    import psutil

    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except ProcessLookupError:
            continue
    return members


def _lives(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
