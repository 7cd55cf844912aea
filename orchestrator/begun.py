"""Submissions that have begun: the same command, repeated, goes on with the run id that it had.

A submission that has begun lies in FLEETUNE_HOME/submitting, locked by the client that makes it. The lock falls with
the client, and who then submits the same job goes on with that run id instead of a new one.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, RunEnded
from orchestrator.runs import new_id
from runfolder.folders import home


def identity_of(frozen: Mapping[str, Any]) -> str:
    """What makes two submissions the same: cluster, job and data, on whatever day."""
    same = {key: frozen[key] for key in ("cluster", "job", "digests")}
    if frozen.get("dated"):  # by us: the same command says another date tomorrow
        same["job"] = _undated(same["job"])
    text = json.dumps(same, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    hexadecimal = digest.hexdigest()
    return hexadecimal[:20]


def _undated(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job without its date, or that of each of its stages."""
    undated = dict(job)
    for section in ("data", "generate"):
        if section in job:
            undated[section] = job[section] | {"date": None}
    if "stages" in job:
        undated["stages"] = {stage: _undated(its_job) for stage, its_job in job["stages"].items()}
    return undated


@contextmanager
def id_of_begun(identity: str, name: str) -> Iterator[str]:
    """The run id of a submission, kept for repetitions until the block ends well, or nothing is left to go on with.

    What an earlier try may have begun outlives a refusal: only its run's end lets it be forgotten.
    """
    earlier = _abandoned(identity)
    path, descriptor = earlier or _note_beginning(identity, new_id(name))
    try:
        yield path.name.partition(".")[2]
        path.unlink()
    except InputError as error:
        if not earlier or isinstance(error, RunEnded):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _abandoned(identity: str) -> tuple[Path, int] | None:
    """The note of a submission of the same that its client did not end, locked for us."""
    for path in sorted((home() / "submitting").glob(f"{identity}.*")):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # its client was done just now
        if _lock(descriptor) and _has_name(descriptor, path):
            return path, descriptor
        os.close(descriptor)
    return None


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the locked file still has its name: its client may have been done before our lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _note_beginning(identity: str, run_id: str) -> tuple[Path, int]:
    """Note that a submission begins; the name appears with the lock on it."""
    folder = home() / "submitting"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{identity}.{run_id}"
    hidden = folder / f".{uuid.uuid4().hex}"
    descriptor = os.open(hidden, os.O_CREAT | os.O_RDWR)
    _lock(descriptor)
    hidden.rename(path)
    return path, descriptor


def _lock(descriptor: int) -> bool:
    """Lock an open file for this process; False when another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
