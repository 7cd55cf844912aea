"""Showing that a phase without output goes on: loading and downloading."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runfolder.chain import Attempt

PERIOD_S = 10.0
LEAST_BYTES = 1 << 20  # in a period; what idle threads exchange stays far below


@contextmanager
def noting_progress(attempt: Attempt) -> Iterator[None]:
    """Within it the attempt is alive as long as this process reads or writes: from disk, a network file or the hub.

    A process that hangs moves no bytes, so it is found as anywhere else.
    """
    ended = threading.Event()

    def watch() -> None:
        before = moved_bytes()
        while not ended.wait(PERIOD_S):
            now = moved_bytes()
            if now - before >= LEAST_BYTES:
                attempt.note_progress()
            before = now

    attempt.note_progress()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        attempt.note_progress()


def moved_bytes() -> int:
    """Bytes that this process has read and written so far; 0 where the system does not say.

    A file that is mapped counts as it is fetched (`read_bytes`), a download as it is written (`wchar`).
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    pairs = (line.split(": ") for line in lines)
    counts = dict(pairs)
    read = int(counts["rchar"])
    written = int(counts["wchar"])
    fetched = int(counts["read_bytes"])
    return read + written + fetched
