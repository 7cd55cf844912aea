"""Which checkpoints of a run count, newest first, and the claim of an attempt that starts from one."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runfolder.chain import Attempt, Start, attempts, claim_next, see_slots, step_bounds
from runfolder.files import Record, list_names, read_json, refresh, sync_folder, write_json

MANIFEST = "manifest.json"


def claim_from_newest(run_dir: Path) -> Attempt | None:
    """Claim the next attempt, from the newest checkpoint; None when the run is closed or somebody was faster.

    The attempt takes that checkpoint into its own folder. Its predecessor, who may live and not know that it has
    a successor, removes old checkpoints where it left them.
    """
    see_slots(run_dir)
    attempt = claim_next(run_dir, newest(run_dir))
    if attempt is None or attempt.start is None:
        return attempt
    start = attempt.start
    predecessor = Attempt(run_dir, start.attempt)
    source = checkpoint_folder(predecessor, start.step)
    target = checkpoint_folder(attempt, start.step)
    target.parent.mkdir()
    with suppress(FileNotFoundError):  # removed just before the claim: the workers will say so
        source.rename(target)
    sync_folder(target.parent)
    sync_folder(source.parent)
    return attempt


def newest(run_dir: Path) -> Start | None:
    """The newest checkpoint that counts; None when there is none.

    Its manifest holds and its shards have their sizes. Their hashes are for those who load them, many at a time.
    """
    for start, folder in lineage(run_dir, fresh=True):
        if is_whole(folder):
            return start
    return None


def lineage(run_dir: Path, fresh: bool = False) -> Iterator[tuple[Start, Path]]:
    """Checkpoints with a manifest that count, newest first; `fresh`: also what another host has just saved."""
    for attempt, bound in step_bounds(run_dir):
        steps = map(step_of, finished(attempt, fresh))
        newest_first = sorted(steps, reverse=True)
        for step in newest_first:
            if step <= bound:
                start = Start(attempt.number, step)
                yield start, checkpoint_folder(attempt, step)


def unused(attempt: Attempt) -> list[Path]:
    """Checkpoints that an attempt does not write at the moment: those with a manifest, and all of earlier ones."""
    folders: list[Path] = []
    all_attempts = attempts(attempt.run_dir)
    for other in all_attempts:
        if other.number < attempt.number:
            checkpoints = other.folder / "checkpoints"
            folders.extend(checkpoints.glob("*"))
    return folders + finished(attempt)


def finished(attempt: Attempt, fresh: bool = False) -> list[Path]:
    """The checkpoints in an attempt's folder that have a manifest; `fresh`: also what another host has just saved."""
    if "checkpoints" not in _listing(attempt.folder, fresh):
        return []
    checkpoints = attempt.folder / "checkpoints"
    whole = []
    for name in _listing(checkpoints, fresh):
        folder = checkpoints / name
        if name.startswith("step-") and MANIFEST in _listing(folder, fresh):
            whole.append(folder)
    return whole


def _listing(folder: Path, fresh: bool) -> list[str]:
    """What a folder holds, as the server has it where that is wanted `fresh`."""
    if fresh:
        with suppress(FileNotFoundError):  # removed just now
            refresh(folder)
    return list_names(folder)


def checkpoint_folder(attempt: Attempt, step: int) -> Path:
    """Where an attempt's checkpoint of a step lies."""
    checkpoints = attempt.folder / "checkpoints"
    return checkpoints / f"step-{step}"


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; a ghost that still writes into its folder does not find it after this."""
    unique = uuid.uuid4().hex
    trash = folder.with_name(f".trash-{unique}")
    folder.rename(trash)
    shutil.rmtree(trash)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def write_manifest(folder: Path, record: Record) -> None:
    """Make a checkpoint exist, once all its shards are there; `record["files"]` has their sizes and hashes."""
    manifest = {**record, "sha256": _digest(record)}
    write_json(folder / MANIFEST, manifest)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's manifest is what was written, and every shard that it names has its size."""
    try:
        record = read_json(folder / MANIFEST)
        written = record.pop("sha256", None)
        if written not in (None, _digest(record)):  # versions before 2026-11-29 wrote none
            return False
        files = record["files"]
        for name, file in files.items():
            shard = folder / name
            size = shard.stat().st_size
            if size != file["bytes"]:
                return False
    except (OSError, ValueError):
        return False
    return True


def _digest(record: Record) -> str:
    """The hash of a manifest, whatever the order of its keys."""
    text = json.dumps(record, sort_keys=True)
    hashed = hashlib.sha256(text.encode())
    return hashed.hexdigest()
