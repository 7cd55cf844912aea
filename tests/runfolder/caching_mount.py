"""A folder mounted as a client of NFS sees it: `python caching_mount.py FOLDER MOUNTPOINT SECONDS`.

A pass-through of FUSE whose kernel keeps so long what it was told of names, of names that are not there, and of
attributes; listings are kept here, until this client itself changes their folder. Mounted twice, one folder has two
clients, and neither learns by itself what the other has changed. As on NFS, a file that is opened has the size and is
read as it is then (close-to-open consistency: RFC 1813, section 4.11).
"""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

from mfusepy import FUSE, Operations, _libfuse


class PassThrough(Operations):
    """Every operation on a path is done on the same path below `root`."""

    use_ns = True

    def __init__(self, root: Path, kept_s: float) -> None:
        self._root = root
        self._kept_s = kept_s
        self._listings: dict[str, tuple[float, list[str]]] = {}  # of a folder, and since when

    def _real(self, path: str) -> str:
        return f"{self._root}{path}"

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        times = {f"st_{kind}": getattr(found, f"st_{kind}_ns") for kind in ("atime", "mtime", "ctime")}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        now = time.monotonic()
        since, names = self._listings.get(path, (-self._kept_s, []))
        if now - since >= self._kept_s:
            names = os.listdir(self._real(path))
            self._listings[path] = now, names
        return [".", "..", *names]

    def _forget_listing_with(self, path: str) -> None:
        """Forget the listing of the folder that a path is in, and those below the path."""
        self._listings.pop(os.path.dirname(path), None)
        for folder in [folder for folder in self._listings if f"{folder}/".startswith(f"{path}/")]:
            del self._listings[folder]

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._real(path), mode)
        self._forget_listing_with(path)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._real(path))
        self._forget_listing_with(path)
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._real(path))
        self._forget_listing_with(path)
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._real(old), self._real(new))
        self._forget_listing_with(old)
        self._forget_listing_with(new)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._real(path), ns=times)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        # Exclusive creation reaches us as creation of a name that the kernel believes is not there.
        descriptor = os.open(self._real(path), os.O_RDWR | os.O_CREAT, mode)
        self._forget_listing_with(path)
        return descriptor

    def open(self, path: str, flags: int) -> int:
        fuse = ctypes.c_void_p(_libfuse.fuse_get_context().contents.fuse)
        _libfuse.fuse_invalidate_path(fuse, path.encode())  # its attributes in the kernel, so that it asks again
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
    folder, mountpoint, kept_s = sys.argv[1:]
    kept = {f"{what}_timeout": int(kept_s) for what in ("entry", "negative", "attr")}
    served = PassThrough(Path(folder), int(kept_s))
    FUSE(served, mountpoint, foreground=True, direct_io=True, nothreads=True, **kept)
