"""Detached processes that hold a lock on a file as long as they live, on a local disk.

The lock (flock) is inherited from who starts the process, so there is no moment in which it runs without holding it,
and it falls when the process dies, however it dies. The file says who the process is (see holder.py). Each process
leads a session of its own, by which everything that it started is found.

Nothing is done about a process of another host, which may hold a lock where hosts share a folder: raises Unreachable.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clusters import holder
from clusters.base import Unreachable
from clusters.holder import Holder
from fleetune_start import unshadowed

_LOCK_VARIABLE = "FLEETUNE_LOCK_DESCRIPTOR"
_KILL_S = 10.0  # a process that is stuck in a driver does not die; nobody waits for it for ever
_LOCK_TIMEOUT_S = 0.3  # others probe the lock, or start the process, for milliseconds
_LOCK_FILE_BYTES = 4096  # bytes of what a lock file says


def spawn(lock: Path, command: Sequence[str], environment: Mapping[str, str], log: Path) -> bool:
    """Start a process that holds `lock`, its output appended to `log`; False when one holds it already.

    Raises Unreachable when that one is on another host.
    """
    holder.current_holder()  # what it imports and looks up once is there before the fork
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _acquire(descriptor, lock):
            return False
        os.ftruncate(descriptor, 0)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                env={**unshadowed(environment), _LOCK_VARIABLE: str(descriptor)},
                cwd="/",  # never a folder of the user: Ray puts it on the workers' sys.path
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[descriptor],
                # Written by the child itself: who dies between fork and a note of the parent leaves no gap.
                preexec_fn=lambda: os.pwrite(descriptor, holder.current_holder().dump(), 0),
            )
            child.returncode = 0  # nobody waits for it: it outlives us, or `reap` collects it
        return True
    finally:
        os.close(descriptor)


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Hold a lock that was set free; raises BlockingIOError when somebody took it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _acquire(descriptor, lock):
            raise BlockingIOError(f"{lock} is held by another process")
        os.ftruncate(descriptor, 0)
        yield
    finally:
        os.close(descriptor)


def release() -> None:
    """Let go of the lock that this process was started with."""
    descriptor = os.environ[_LOCK_VARIABLE]
    os.close(int(descriptor))


def owner(lock: Path) -> int | None:
    """The id of the process that holds the lock; None when nobody does, raises Unreachable when it is elsewhere."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        current = _holder_of(descriptor)
    finally:
        os.close(descriptor)
    if current is None:
        return None
    if not current.here:
        raise _elsewhere(lock, current)
    return current.pid


def end(lock: Path) -> None:
    """Kill the process that holds the lock, and what is left of its session; returns when all of it is gone.

    Raises Unreachable, and kills nothing, when that process is on another host.
    """
    if not lock.exists():
        return
    is_held = owner(lock) is not None
    leader = _last_holder(lock)
    # The system gives no number to a new process while a session of that number has members. So members without a
    # leader are ours, unless all of ours ended unseen. A leader that lives and let go of its lock ends by itself.
    if leader is None or not leader.here or leader.replaced or (leader.lives and not is_held):
        return
    deadline = time.monotonic() + _KILL_S
    while (members := _session(leader.pid)) and time.monotonic() < deadline:
        for member in members:
            _kill(member)
        time.sleep(0.05)
    if not members:
        _erase(lock, leader)


def reap() -> None:
    """Collect the child processes that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _acquire(descriptor: int, lock: Path) -> bool:
    """Lock a file for the process to be; others that only probe it are waited for."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        recorded = _recorded(descriptor)
        if recorded and recorded.lives:
            return False
        if time.monotonic() > deadline:
            if recorded and not recorded.here:
                raise _elsewhere(lock, recorded)
            return False
        time.sleep(0.005)
    return True


def _holder_of(descriptor: int) -> Holder | None:
    """Who holds a lock; None when nobody does, or whoever takes it just now has not said so."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while not _try_lock(descriptor, fcntl.LOCK_SH):
        recorded = _recorded(descriptor)
        if recorded and recorded.lives:
            return recorded
        if time.monotonic() > deadline:
            # A dead leader's children may hold its lock; a number that a stranger has now is an old one.
            return recorded if recorded and not recorded.replaced else None
        time.sleep(0.005)
    return None


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recorded(descriptor: int) -> Holder | None:
    data = os.pread(descriptor, _LOCK_FILE_BYTES, 0)
    return holder.parse_holder(data)


def _last_holder(lock: Path) -> Holder | None:
    """Who held a lock last, as its file says."""
    with lock.open("rb") as stream:
        return _recorded(stream.fileno())


def _erase(lock: Path, gone: Holder) -> None:
    """Take a holder that is gone out of the file: its number may come to lead somebody else's session."""
    with lock.open("r+b") as stream:
        descriptor = stream.fileno()
        if _try_lock(descriptor, fcntl.LOCK_EX) and _recorded(descriptor) == gone:
            os.ftruncate(descriptor, 0)


def _elsewhere(lock: Path, current: Holder) -> Unreachable:
    holder = f"process {current.pid} on {current.host}"
    todo = "run this there, or set FLEETUNE_HOME to a folder of this host"
    return Unreachable(f"cluster local: {lock} is held by {holder}; {todo}")


def _session(leader: int) -> list[int]:
    import psutil

    members = []
    for process in psutil.process_iter(["status"]):
        try:
            is_member = os.getsid(process.pid) == leader
        except ProcessLookupError:
            continue
        if is_member and process.info["status"] != psutil.STATUS_ZOMBIE and not _is_stranger(process):
            members.append(process.pid)
    return members


def _is_stranger(process: Any) -> bool:
    """Whether a process is certainly of no session of ours: it would have inherited the mark of our processes."""
    import psutil

    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    # A process that has set its title has overwritten what can be read of its environment, as Ray's do.
    return bool(environment) and _LOCK_VARIABLE not in environment


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
