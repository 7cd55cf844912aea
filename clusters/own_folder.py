"""Folders in /tmp that a process has for itself; what SIGKILL leaves of them is removed by the next one there."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARENT = Path("/tmp")  # short: the path of a socket has 107 bytes


@contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """A folder of this process, which is locked, and removed behind the block; first those of dead processes are."""
    _remove_left_folders(prefix)
    hidden = Path(tempfile.mkdtemp(prefix=".", dir=_PARENT))
    with (hidden / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = hidden.rename(_PARENT / f"{prefix}{hidden.name[1:]}")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_folders(prefix: str) -> None:
    """Remove the folders of processes of this user that were killed here: their locks are free."""
    for path in _PARENT.glob(f"{prefix}*/lock"):
        with suppress(OSError), path.open() as lock:  # another user's, or just removed
            at_once = fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.flock(lock, at_once)
            shutil.rmtree(path.parent, ignore_errors=True)
