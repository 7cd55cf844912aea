"""A lock on a file of a file system that hosts share, for what is better done by one client at a time.

It spares work, and nothing relies on it: some file systems have no locks.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from clusters.base import Unreachable
from clusters.file_locks import NO_LOCKS

_WAIT_S = 60.0
_LOCK_POLL_S = 0.1


@contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Hold the lock while the block runs; it falls with this process. Raises Unreachable while another one has it."""
    with path.open("w") as stream:
        deadline = time.monotonic() + _WAIT_S
        while not _is_taken(stream):
            if time.monotonic() > deadline:
                raise Unreachable(f"another command has held {path} for {_WAIT_S:.0f} s: repeat this one later")
            time.sleep(_LOCK_POLL_S)
        yield


def _is_taken(stream: TextIO) -> bool:
    """Take the lock where nobody has it; whether it is ours, or there are no locks here."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
