"""claim.json, the claim of a slot: written into a prepared folder, which then becomes the slot, and never changed."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from runfolder.files import Record, list_names, read_json, write_json

_CLAIM_FILE = "claim.json"


def prepare_claim(slots_dir: Path, token: str, record: Record) -> Path:
    """A new folder beside the slots that holds a claim of this process; `token` tells it from all others."""
    slots_dir.mkdir(parents=True, exist_ok=True)
    prepared = slots_dir / f".claim-{token}"
    prepared.mkdir()
    claimer = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    write_json(prepared / _CLAIM_FILE, {**record, **claimer})
    return prepared


def read_claim(slot_dir: Path) -> Record:
    """The claim of a slot that is taken; raises FileNotFoundError for one that is not."""
    try:
        return read_json(slot_dir / _CLAIM_FILE)
    except FileNotFoundError:
        if slot_dir.name not in list_names(slot_dir.parent):
            raise
    # This client still believes what it was told before the slot was taken, as when it wanted the slot itself.
    # The server refuses to make what is there, and with that the client forgets it.
    with suppress(FileExistsError):
        slot_dir.mkdir()
    return read_json(slot_dir / _CLAIM_FILE)
