"""What jobs of a scheduler printed, which is in a file for each submission."""

import os
from collections.abc import Iterable
from pathlib import Path

from clusters.base import Logs

_MOST_BYTES = 1 << 24  # of a log in one answer, which somebody has in memory
_ENDING_BYTES = 4096
_LONGEST_LINE = 300  # characters


def joined_logs(paths: Iterable[Path], offset: int) -> Logs:
    """What these files have from an offset on, as if they were one, the oldest first; of much, the first part."""
    parts = []
    to_skip = offset
    room = _MOST_BYTES
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        size = size_of(path)
        if to_skip > size:
            to_skip -= size
            continue
        with path.open("rb") as stream:
            stream.seek(to_skip)
            part = stream.read(room)
        parts.append(part)
        to_skip = 0
        room -= len(part)
    data = b"".join(parts)
    if room == 0:  # up to a whole line, so that no letter is cut
        data = data[: data.rfind(b"\n") + 1] or data
    return Logs(data.decode(errors="replace"), offset + len(data))


def size_of(path: Path) -> int:
    """How many bytes a file has; 0 where there is none."""
    if not path.exists():
        return 0
    return path.stat().st_size


def last_line(path: Path, since: int = 0) -> str:
    """The last line that has anything in a file of words, from an offset on; empty where there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(since, stream.seek(0, os.SEEK_END) - _ENDING_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-_LONGEST_LINE:] if lines else ""
