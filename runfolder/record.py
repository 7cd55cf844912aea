"""RUN_DIR/job.yaml: what was submitted, frozen; and beside it run.json, the few fields of it that every look needs.

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

from runfolder.files import Damaged, Record, list_names, read_json, sync_folder, write_json
from runfolder.job import Job

RECORD_FORMAT = 1
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BRIEF = "run.json"


def create_run_folder(run_dir: Path, record: Mapping[str, Any]) -> Record | None:
    """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
    token = uuid.uuid4().hex
    prepared = run_dir.parent / f".new-{token}"
    prepared.mkdir(parents=True)
    path = prepared / "job.yaml"
    with path.open("w") as stream:
        formatted = {"format": RECORD_FORMAT, **record}
        yaml.safe_dump(formatted, stream, sort_keys=False, allow_unicode=True)
        stream.flush()
        os.fsync(stream.fileno())
    brief = _brief(record)
    write_json(prepared / _BRIEF, brief)
    try:
        prepared.rename(run_dir)
    except OSError:
        shutil.rmtree(prepared)
        if run_dir.name not in list_names(run_dir.parent):
            raise
        return read_record(run_dir)
    sync_folder(run_dir.parent)
    return None


def read_record(run_dir: Path) -> Record:
    """RUN_DIR/job.yaml as plain data; raises Damaged."""
    path = run_dir / "job.yaml"
    try:
        data = path.read_bytes()
        record = yaml.load(data, Loader=_LOADER)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise Damaged(f"{path}: not YAML: {reason}") from None
    return _checked_record(path, record)


def read_brief(run_dir: Path) -> Record:
    """{cluster, submitted, steps} of a run: `steps` as its job says, None where it says epochs; raises Damaged."""
    path = run_dir / _BRIEF
    if _BRIEF not in list_names(run_dir):
        try:
            record = read_record(run_dir)
            return _brief(record)
        except (KeyError, TypeError) as error:
            raise Damaged(f"{run_dir / 'job.yaml'}: {type(error).__name__}: {error}") from None
    return _checked_record(path, read_json(path))


def load_job(run_dir: Path) -> Job:
    """The frozen spec of a run; raises Damaged, also where another version of Fleetune wrote what this one lacks."""
    record = read_record(run_dir)
    path = run_dir / "job.yaml"
    return job_in(record, str(path))


def job_in(record: Mapping[str, Any], path: str) -> Job:
    """The frozen spec in a record, which is that of the file `path`; raises Damaged."""
    job = record.get("job")
    if not isinstance(job, dict):
        raise Damaged(f"{path}: found no job in it")
    try:
        return Job.model_validate(job)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        where = field or "job"
        raise Damaged(f"{path}: {where}: {first['msg']} (is it of another version?)") from None


def _brief(record: Mapping[str, Any]) -> Record:
    train = record["job"]["train"]
    steps = train["steps"]
    cluster = record["cluster"]
    submitted = record["submitted"]
    return {"format": RECORD_FORMAT, "cluster": cluster, "submitted": submitted, "steps": steps}


def _checked_record(path: Path, record: Any) -> Record:
    """A record of a format that is known; raises Damaged."""
    if not isinstance(record, dict):
        raise Damaged(f"{path}: found {type(record).__name__}; allowed: a mapping")
    version = record.get("format", 1)
    if version != RECORD_FORMAT:
        raise Damaged(
            f"{path}: found format {version}; allowed: {RECORD_FORMAT}: use the Fleetune that has written it"
        )
    return record
