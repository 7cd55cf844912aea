"""RUN_DIR/hindered.json: why starts of a run make no attempt at it, which counts until the next slot is taken."""

from pathlib import Path

from runfolder.chain import last_slot
from runfolder.files import Record, list_names, read_json, write_json
from runfolder.shapes import HINDRANCE

_HINDRANCE_FILE = "hindered.json"


def note_hindrance(run_dir: Path, submission: int, why: str, gives_up: bool = False) -> int:
    """Note what keeps a start of a submission from an attempt, and whether that start gives up.

    Gives how many starts of the submission have given up in a row.
    """
    earlier = hindrance(run_dir)
    starts = 0
    if earlier and earlier["submission"] == submission:
        starts = earlier["starts"]
    starts += gives_up
    slot = last_slot(run_dir)
    write_json(run_dir / _HINDRANCE_FILE, {"slot": slot, "submission": submission, "starts": starts, "why": why})
    return starts


def hindrance(run_dir: Path) -> Record | None:
    """What keeps the run's latest starts from an attempt: {submission, starts (that gave up), why}; None: nothing."""
    if _HINDRANCE_FILE not in list_names(run_dir):
        return None
    noted = read_json(run_dir / _HINDRANCE_FILE, HINDRANCE)
    if noted["slot"] != last_slot(run_dir):
        return None
    return noted
