"""What jobs of a scheduler printed, which is in a file for each submission."""

from collections.abc import Iterable
from pathlib import Path

from clusters.base import Logs


def joined_logs(paths: Iterable[Path], offset: int) -> Logs:
    """What these files have from an offset on, as if they were one, the oldest first."""
    texts = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        texts.append(path.read_bytes())
    data = b"".join(texts)[offset:]
    return Logs(data.decode(errors="replace"), offset + len(data))
