"""What clients that were killed have left where run folders are, and what runs leave that have ended.

Nothing that may still be needed is found: what arrives in part is left for a day, in which a repetition goes on with
it, and secrets are those of runs that have their final word.
"""

import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from runfolder.files import list_names
from runfolder.secrets import holds_secrets, remove_secrets
from runfolder.snapshot import has_ended

_ABANDONED_S = 86_400.0  # since the last change, after which nobody goes on with what came in part
_IN_PART = {  # by folder of FLEETUNE_HOME: what begins with a dot there came in part
    "code": "Fleetune's code",
    "files": "a file that a job brought along",
    "runs": "a run folder",
}


@dataclass(frozen=True)
class HomeLeftover:
    """Something below FLEETUNE_HOME by its path there: why nobody needs it, and how many bytes it has."""

    path: str
    why: str
    size: int

    def dump(self) -> dict[str, object]:
        """It as plain data, for JSON."""
        return asdict(self)


def leftovers_in(home: Path) -> list[HomeLeftover]:
    """What is left over below a FLEETUNE_HOME."""
    in_part = _come_in_part(home)
    of_ended = _secrets_of_ended(home)
    return [*in_part, *of_ended]


def remove_leftovers(home: Path, paths: Collection[str]) -> list[HomeLeftover]:
    """Remove those of some paths that are left over still; gives them."""
    removed = []
    for leftover in leftovers_in(home):
        if leftover.path not in paths:
            continue
        path = home / leftover.path
        if path.name == "secrets.json":
            remove_secrets(path.parent)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(leftover)
    return removed


def _come_in_part(home: Path) -> Iterator[HomeLeftover]:
    """Files and folders that came in part, and that nobody has gone on with for a day."""
    oldest = time.time() - _ABANDONED_S
    for folder, what in _IN_PART.items():
        whole = home / folder
        for name in sorted(list_names(whole)):
            path = whole / name
            if name.startswith(".") and _last_change(path) < oldest:
                size = _bytes_below(path)
                yield HomeLeftover(f"{folder}/{name}", f"{what} that came in part, more than a day ago", size)


def _secrets_of_ended(home: Path) -> Iterator[HomeLeftover]:
    """Secrets of runs that have ended, whose controller could not remove them."""
    runs = home / "runs"
    for run_id in sorted(list_names(runs)):
        run_dir = runs / run_id
        if not run_id.startswith(".") and holds_secrets(run_dir) and has_ended(run_dir):
            yield HomeLeftover(f"runs/{run_id}/secrets.json", "secrets of a run that has ended", 0)


def _last_change(path: Path) -> float:
    """When something below a path was last changed; now for what goes as one looks."""
    try:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _bytes_below(path: Path) -> int:
    """The bytes of a file, or of the files below a folder."""
    total = 0
    for each in (path, *path.rglob("*")):
        if each.is_file():
            total += each.stat().st_size
    return total
