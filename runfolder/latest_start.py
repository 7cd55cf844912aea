"""RUN_DIR/latest_start.json: which slot was the newest when somebody last set out to take the run further.

Of all who do so the latest works. So an attempt in that slot, or before it, is over, though nobody may have said how
it ended: its controller was killed, or its node was lost.
"""

from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from runfolder.chain import Attempt, last_slot
from runfolder.files import read_json, write_json
from runfolder.shapes import LATEST_START

_LATEST_START_FILE = "latest_start.json"


def note_latest_start(run_dir: Path) -> int:
    """Note that a batch job or a controller of a run starts, where the disk has space; gives the newest slot."""
    slot = last_slot(run_dir)
    with suppress(OSError):  # what people see is not worth an attempt
        write_json(run_dir / _LATEST_START_FILE, {"slot": slot})
    return slot


def is_left(attempt: Attempt, files: Container[str]) -> bool:
    """Whether a run was started anew since an attempt at it was claimed; `files` are those of the run's folder."""
    if _LATEST_START_FILE not in files:
        return False
    latest = read_json(attempt.run_dir / _LATEST_START_FILE, LATEST_START)
    slot: int = latest["slot"]
    return 0 < attempt.number <= slot
