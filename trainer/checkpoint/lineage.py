"""Which checkpoints of a run count, newest first, and the claim of an attempt that starts from one."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runfolder.chain import Attempt, Start, attempts, bounds, claim_next
from runfolder.files import Record, read_json, sync_folder, write_json

MANIFEST = "manifest.json"


def claim_from_newest(run_dir: Path) -> Attempt | None:
    """Claim the next attempt, from the newest checkpoint; None when the run is closed or somebody was faster.

    The attempt takes that checkpoint into its own folder. Its predecessor, who may live and not know that it has
    a successor, removes old checkpoints where it left them.
    """
    attempt = claim_next(run_dir, newest(run_dir))
    if attempt is None or attempt.start is None:
        return attempt
    left = folder_of(Attempt(run_dir, attempt.start.attempt), attempt.start.step)
    own = folder_of(attempt, attempt.start.step)
    own.parent.mkdir()
    with suppress(FileNotFoundError):  # removed just before the claim: the workers will say so
        left.rename(own)
    sync_folder(own.parent)
    sync_folder(left.parent)
    return attempt


def newest(run_dir: Path) -> Start | None:
    """The newest checkpoint that counts; None when there is none.

    Its manifest holds and its shards have their sizes. Their hashes are for those who load them, many at a time.
    """
    return next((start for start, folder in lineage(run_dir) if is_whole(folder)), None)


def lineage(run_dir: Path) -> Iterator[tuple[Start, Path]]:
    """Checkpoints with a manifest that count, newest first."""
    for attempt, bound in bounds(run_dir):
        steps = sorted(map(step_of, finished(attempt)), reverse=True)
        yield from ((Start(attempt.number, step), folder_of(attempt, step)) for step in steps if step <= bound)


def unused(attempt: Attempt) -> list[Path]:
    """Checkpoints that an attempt does not write at the moment: those with a manifest, and all of earlier ones."""
    earlier = [other for other in attempts(attempt.run_dir) if other.number < attempt.number]
    return [
        *(folder for other in earlier for folder in (other.folder / "checkpoints").glob("*")),
        *finished(attempt),
    ]


def finished(attempt: Attempt) -> list[Path]:
    """The checkpoints in an attempt's folder that have a manifest."""
    return [path.parent for path in (attempt.folder / "checkpoints").glob(f"step-*/{MANIFEST}")]


def folder_of(attempt: Attempt, step: int) -> Path:
    """Where an attempt's checkpoint of a step lies."""
    return attempt.folder / "checkpoints" / f"step-{step}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def write_manifest(folder: Path, record: Record) -> None:
    """Make a checkpoint exist, once all its shards are there; `record["files"]` has their sizes and hashes."""
    write_json(folder / MANIFEST, {**record, "sha256": _digest(record)})


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's manifest is what was written, and every shard that it names has its size."""
    try:
        record = read_json(folder / MANIFEST)
        hashed = record.pop("sha256", None)
        if hashed not in (None, _digest(record)):  # versions before 2026-11-29 wrote none
            return False
        return all((folder / name).stat().st_size == file["bytes"] for name, file in record["files"].items())
    except (OSError, ValueError):
        return False


def _digest(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
