"""RUN_DIR/job.yaml: what was submitted, frozen; and beside it run.json, the little of it that every look needs.

The record is {format, run_id, cluster, submitted, versions, digests, git, job}. `format` is 1; what has none was
written before there were formats, and is read as 1. A newer one is refused by name: nobody guesses at it.
"""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from runfolder.files import Damaged, Record, names, read_json, sync_folder, write_json
from runfolder.job import Job

FORMAT = 1
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BRIEF = "run.json"


def create(run_dir: Path, record: Mapping[str, Any]) -> Record | None:
    """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
    prepared = run_dir.parent / f".new-{uuid.uuid4().hex}"
    prepared.mkdir(parents=True)
    with (prepared / "job.yaml").open("w") as stream:
        yaml.safe_dump({"format": FORMAT, **record}, stream, sort_keys=False, allow_unicode=True)
        stream.flush()
        os.fsync(stream.fileno())
    write_json(prepared / _BRIEF, _brief(record))
    try:
        prepared.rename(run_dir)
    except OSError:
        shutil.rmtree(prepared)
        if run_dir.name not in names(run_dir.parent):
            raise
        return read_record(run_dir)
    sync_folder(run_dir.parent)
    return None


def read_record(run_dir: Path) -> Record:
    """RUN_DIR/job.yaml as plain data; raises Damaged."""
    path = run_dir / "job.yaml"
    try:
        record = yaml.load(path.read_bytes(), Loader=_LOADER)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return _checked(path, record)


def read_brief(run_dir: Path) -> Record:
    """{cluster, submitted, steps} of a run: `steps` as its job says, None where it says epochs; raises Damaged."""
    path = run_dir / _BRIEF
    if _BRIEF not in names(run_dir):
        try:
            return _brief(read_record(run_dir))
        except (KeyError, TypeError) as error:
            raise Damaged(f"{run_dir / 'job.yaml'}: {type(error).__name__}: {error}") from None
    return _checked(path, read_json(path))


def load_job(run_dir: Path) -> Job:
    """The frozen spec of a run; raises Damaged, also where another version of Fleetune wrote what this one lacks."""
    return job_in(read_record(run_dir), str(run_dir / "job.yaml"))


def job_in(record: Mapping[str, Any], path: str) -> Job:
    """The frozen spec in a record, which is that of the file `path`; raises Damaged."""
    if not isinstance(record.get("job"), dict):
        raise Damaged(f"{path}: found no job in it")
    try:
        return Job.model_validate(record["job"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "job"
        raise Damaged(f"{path}: {where}: {first['msg']} (is it of another version?)") from None


def _brief(record: Mapping[str, Any]) -> Record:
    steps = record["job"]["train"]["steps"]
    return {"format": FORMAT, "cluster": record["cluster"], "submitted": record["submitted"], "steps": steps}


def _checked(path: Path, record: Any) -> Record:
    """A record of a format that is known; raises Damaged."""
    if not isinstance(record, dict):
        raise Damaged(f"{path}: found {type(record).__name__}; allowed: a mapping")
    found = record.get("format", 1)
    if found != FORMAT:
        raise Damaged(f"{path}: found format {found}; allowed: {FORMAT}: use the Fleetune that has written it")
    return record
