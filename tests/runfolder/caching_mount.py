"""A folder mounted as a client of NFS sees it: `python caching_mount.py FOLDER MOUNTPOINT`.

A pass-through of FUSE whose kernel keeps for 60 s what it was told of names, of names that are not there, and of
attributes. Mounted twice, one folder has two clients, and neither learns by itself what the other has changed. As on
NFS, a file that is opened is read as it is then (`direct_io`).
"""

import os
import sys
from pathlib import Path
from typing import Any

from mfusepy import FUSE, Operations

KEPT_S = 60


class PassThrough(Operations):
    """Every operation on a path is done on the same path below `root`."""

    use_ns = True

    def __init__(self, root: Path) -> None:
        self._root = root

    def _real(self, path: str) -> str:
        return f"{self._root}{path}"

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        times = {f"st_{kind}": getattr(found, f"st_{kind}_ns") for kind in ("atime", "mtime", "ctime")}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._real(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._real(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._real(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._real(old), self._real(new))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._real(path), ns=times)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        # Exclusive creation reaches us as creation of a name that the kernel believes is not there.
        return os.open(self._real(path), os.O_RDWR | os.O_CREAT, mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._real(path), flags & ~os.O_APPEND)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._real(path), length)
        return 0

    def fsync(self, path: str, datasync: bool, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: bool, fh: int) -> int:
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


if __name__ == "__main__":
    kept = {f"{what}_timeout": KEPT_S for what in ("entry", "negative", "attr")}
    FUSE(PassThrough(Path(sys.argv[1])), sys.argv[2], foreground=True, direct_io=True, nothreads=True, **kept)
