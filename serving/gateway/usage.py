"""What tenants used today, on disk, so that their quotas outlast the server.

The folder of a service may be on a file system that hosts share. Each server has a file of its own there, which it
alone writes, whole or not at all; what is used is the sum of all files. So nobody needs a lock, and a server that was
started again, or a second one of the same service, goes on from what the others have written.
"""

import threading
import uuid
from pathlib import Path

from runfolder.files import Damaged, list_names, read_json, refresh, write_json

OWNER_ONLY = 0o700


class UsageFolder:
    """The tokens of a day by tenant, as the servers of one service have written them."""

    def __init__(self, folder: Path) -> None:
        """Make the folder where it is missing; raises OSError where it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True, mode=OWNER_ONLY)
        refresh(folder)
        self._folder = folder
        self._own = folder / f"{uuid.uuid4().hex}.json"
        self._day = 0
        self._tokens: dict[str, int] = {}
        self._writing = threading.Lock()

    def elsewhere(self, tenant: str, day: int) -> int:
        """The tokens of a tenant's day that others have written, or this server before it was started again.

        Raises OSError, and Damaged for a file that none of them has written.
        """
        refresh(self._folder)
        total = 0
        for path in self._files():
            if path == self._own:
                continue
            written = read_json(path)
            if written.get("day") == day:
                total += tokens_in(path, written.get("tokens"), tenant)
        return total

    def keep(self, tenant: str, day: int, tokens: int) -> None:
        """Write down so many tokens of a tenant's day, from any thread, unless it is over; raises OSError."""
        with self._writing:
            if day < self._day:
                return
            kept: dict[str, int] = {}
            if day == self._day:
                kept |= self._tokens
            kept[tenant] = tokens
            write_json(self._own, {"day": day, "tokens": kept})
            self._day = day
            self._tokens = kept

    def clear(self, day: int) -> None:
        """Remove what was written before a day, by servers that may be gone; raises OSError and Damaged."""
        for path in self._files():
            written = read_json(path)
            if path != self._own and written.get("day", day) < day:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The files of all servers."""
        files = []
        for name in list_names(self._folder):
            is_hidden = name.startswith(".")
            if name.endswith(".json") and not is_hidden:
                files.append(self._folder / name)
        return files


def tokens_in(path: Path, tokens: object, tenant: str) -> int:
    """The tokens of a tenant in what a file says; raises Damaged."""
    if isinstance(tokens, dict):
        found = tokens.get(tenant, 0)
        if isinstance(found, int):
            return found
    raise Damaged(f"{path}: found no tokens by tenant; allowed: what a server has written")
