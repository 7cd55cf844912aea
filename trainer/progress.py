"""Showing what is being done, and that a phase without output goes on: loading, downloading, evaluating."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from runfolder.activity import phase_text
from runfolder.chain import Attempt
from trainer.world import World

PERIOD_S = 10.0
LEAST_BYTES = 1 << 20  # in a period; what idle threads exchange stays far below
Item = TypeVar("Item")


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


def announce(attempt: Attempt, world: World, kind: str, **fields: Any) -> None:
    """Tell readers, once for all workers, what begins: by an event, and in the log."""
    if not world.leads:
        return
    attempt.event(kind, **fields)
    text = phase_text({"event": kind, **fields})
    if text:
        print(text, flush=True)


def counted(
    attempt: Attempt, world: World, step: int, what: str, items: Sequence[Item], size: Callable[[Item], int]
) -> Iterator[Item]:
    """Give items of an evaluation one by one; tell readers of its begin, then now and then how far it has come.

    What is counted is called `what`, and each item has `size(item)` of it.
    """
    total = sum(map(size, items))
    began = time.time()
    told_at = -math.inf
    done = 0
    for item in items:
        now = time.monotonic()
        if now - told_at >= PERIOD_S:
            told_at = now
            announce(attempt, world, "evaluating", step=step, began=began, what=what, done=done, total=total)
        yield item
        done += size(item)


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
