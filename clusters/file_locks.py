"""Which file carries a lock (flock) where file systems may have none, as Lustre without `-o flock`.

The machine of a cluster needs this before it has packages: Python alone.
"""

import errno
import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def lock_file(path: Path) -> Path:
    """The file to lock for a path: itself, or where it cannot be locked one in this host's own temporary folder.

    That one keeps apart those who are on one host, as clients of a cluster mostly are. The file is there afterwards.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _stand_in(path)
    finally:
        os.close(descriptor)
    return path


def _stand_in(path: Path) -> Path:
    """A file of this user on this host, for one that cannot be locked."""
    folder = Path(tempfile.gettempdir(), f"fleetune-locks-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is of another user", str(folder))
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    stand_in = folder / digest.hexdigest()
    stand_in.touch(mode=0o600)
    return stand_in
