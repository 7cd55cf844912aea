"""One folder as several clients of NFS see it: mounted by FUSE, each mount with a cache of its own."""

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import until

SERVER = Path(__file__).parent / "runfolder" / "caching_mount.py"


@contextmanager
def two_clients(folder: Path, beside: Path, kept_s: int = 60) -> Iterator[tuple[Path, Path]]:
    """A folder mounted twice, at `a` and `b` in another one; either keeps so long what it was told."""
    if not can_mount():
        pytest.skip("needs root, /dev/fuse and libfuse3")
    with mounted(folder, beside / "a", kept_s) as a, mounted(folder, beside / "b", kept_s) as b:
        yield a, b


@contextmanager
def mounted(folder: Path, at: Path, kept_s: int) -> Iterator[Path]:
    """A folder as one client sees it (see runfolder/caching_mount.py)."""
    at.mkdir()
    server = subprocess.Popen([sys.executable, SERVER, folder, at, str(kept_s)])

    def is_up() -> bool:
        assert server.poll() is None, "no mount"
        return at.is_mount()

    try:
        until(is_up)
        yield at
    finally:
        server.terminate()
        server.wait()
        subprocess.run(["umount", "-l", at], capture_output=True)


def can_mount() -> bool:
    """Whether this process may mount, and has what it takes."""
    return ctypes.util.find_library("fuse3") is not None and os.geteuid() == 0 and Path("/dev/fuse").exists()
