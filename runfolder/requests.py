"""What people ask of a run: one file each in RUN_DIR/requests."""

import time
from pathlib import Path

from runfolder.chain import last_slot, slots
from runfolder.files import write_json


def request_cancel(run_dir: Path) -> None:
    """Ask for the end of a run; whoever leads it closes it as cancelled."""
    folder = run_dir / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"cancel-{last_slot(run_dir)}.json", {"time": time.time()})


def cancel_requested(run_dir: Path) -> bool:
    """Whether somebody asked for the end of the run since it was last (re)opened."""
    reopened = [slot.number for slot in slots(run_dir) if slot.claim["kind"] == "reopen"]
    asked = [int(path.stem.rpartition("-")[2]) for path in (run_dir / "requests").glob("cancel-*.json")]
    return any(number >= max(reopened, default=0) for number in asked)
