"""Showing that a phase without output goes on: loading and downloading."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runfolder.chain import Attempt

PERIOD_S = 10.0
LEAST_BYTES = 1 << 20  # in a period; what idle threads exchange stays far below


@contextmanager
def shown(attempt: Attempt) -> Iterator[None]:
    """Within it the attempt is alive as long as this process reads or writes: from disk, a network file or the hub.

    A process that hangs moves no bytes, so it is found as anywhere else.
    """
    ended = threading.Event()

    def look() -> None:
        seen = moved_bytes()
        while not ended.wait(PERIOD_S):
            now = moved_bytes()
            if now - seen >= LEAST_BYTES:
                attempt.alive()
            seen = now

    attempt.alive()
    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        attempt.alive()


def moved_bytes() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not say.

    A file that is mapped counts as it is fetched (`read_bytes`), a download as it is written (`wchar`).
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(": ") for line in lines)
    return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
