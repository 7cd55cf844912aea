"""Which runs do the stages of a job: RUN_DIR/stages/NAME/run.json, each noted once, and runs/.stages/KEY/run.json.

A stage is a run of its own, whose folder is beside that of its job. All that is known of how far a job has come is in
the folders of its stages. The key of a stage is a digest of what it does and of all that it reads; what has a key in
runs/.stages was done well by some job, and is not done again.
"""

import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runfolder.chain import reopen, result
from runfolder.files import Record, list_names, read_json, take_name, write_json
from runfolder.shapes import STAGE_NOTE

_NOTE_FILE = "run.json"
_DONE = ".stages"


@dataclass(frozen=True)
class StageNote:
    """The run that does a stage, and the key of it; `reused`: another job has had it done."""

    run_id: str
    key: str
    reused: bool


def noted_stage(run_dir: Path, stage: str) -> StageNote | None:
    """The run that does a stage of a job; None where that has not begun."""
    return _read_note(run_dir / "stages" / stage)


def note_stage(run_dir: Path, stage: str, note: StageNote) -> StageNote:
    """Say which run does a stage, unless somebody has said it; gives what counts."""
    folder = run_dir / "stages" / stage
    _take_note(folder, note)
    return _read_note(folder) or note


def stage_folders(run_dir: Path, stages: Iterable[str]) -> dict[str, Path]:
    """The run folders of those stages that have begun, by the names of the stages."""
    folders = {}
    for stage in stages:
        note = noted_stage(run_dir, stage)
        if note is not None:
            folders[stage] = run_dir.parent / note.run_id
    return folders


def begun_stages(run_dir: Path) -> list[str]:
    """The runs of all stages of a job that have begun; none of another job, or of a folder that is not there."""
    run_ids = []
    for name in list_names(run_dir / "stages"):
        note = noted_stage(run_dir, name)
        if note is not None:
            run_ids.append(note.run_id)
    return run_ids


def newest_stage(run_dir: Path, stages: Sequence[str]) -> Record | None:
    """The last one of the stages that have begun: {name, number, of, run_id, run_dir}; None before the first."""
    newest = None
    for stage, folder in stage_folders(run_dir, stages).items():
        number = stages.index(stage) + 1
        newest = {"name": stage, "number": number, "of": len(stages), "run_id": folder.name, "run_dir": str(folder)}
    return newest


def stage_done(runs: Path, key: str) -> str | None:
    """The run that has done what a key says, and whose output is there; None where there is none."""
    note = _read_note(runs / _DONE / key)
    if note is None:
        return None
    run_dir = runs / note.run_id
    if "output" not in list_names(run_dir):
        return None
    return note.run_id


def note_done(runs: Path, note: StageNote) -> None:
    """Say which run has done what a key says; the first one that is still there counts."""
    if stage_done(runs, note.key) is None:
        folder = runs / _DONE / note.key
        shutil.rmtree(folder, ignore_errors=True)
        _take_note(folder, note)


def reopen_stages(run_dir: Path, stages: Iterable[str]) -> None:
    """Let those stages go on that have ended otherwise than well."""
    for folder in stage_folders(run_dir, stages).values():
        ended = result(folder)
        if ended is not None and ended["state"] != "succeeded":
            reopen(folder)


def _read_note(folder: Path) -> StageNote | None:
    if _NOTE_FILE not in list_names(folder):
        return None
    record = read_json(folder / _NOTE_FILE, STAGE_NOTE)
    return StageNote(record["run_id"], record["key"], record["reused"])


def _take_note(folder: Path, note: StageNote) -> None:
    """Make a folder that holds a note, whole or not at all, unless it is there."""
    token = uuid.uuid4().hex
    prepared = folder.parent / f".{token}"
    prepared.mkdir(parents=True)
    write_json(prepared / _NOTE_FILE, asdict(note))
    take_name(prepared, folder)
