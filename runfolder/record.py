"""RUN_DIR/job.yaml: what was submitted, frozen; and beside it run.json, the few fields of it that every look needs.

The record is {format, run_id, cluster, submitted, versions, digests, git, secrets (names alone), job, dated, sent};
`dated` says whether the date in the job is that of its submission, as the job itself said none, and `sent` where what
was sent to the cluster lay before, by its field in the job.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from runfolder.evaluation_job import AnyJob, any_job
from runfolder.files import FORMAT, Damaged, Record, checked_record, read_json, take_name, write_json
from runfolder.job import Job
from runfolder.service import ServiceSpec
from runfolder.shapes import BRIEF, SUBMITTED

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BRIEF = "run.json"
_LINE_BREAKS = "\x85\u2028\u2029"  # PyYAML writes them as letters, and reads them as ends of lines


def create_run_folder(run_dir: Path, record: Mapping[str, Any]) -> Record | None:
    """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
    token = uuid.uuid4().hex
    prepared = run_dir.parent / f".new-{token}"
    prepared.mkdir(parents=True)
    path = prepared / "job.yaml"
    with path.open("w") as stream:
        stream.write(_as_yaml({"format": FORMAT, **record}))
        stream.flush()
        os.fsync(stream.fileno())
    brief = _brief(record)
    write_json(prepared / _BRIEF, brief)
    if take_name(prepared, run_dir):
        return None
    return read_record(run_dir)


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
    return checked_record(record, path, SUBMITTED)


def read_brief(run_dir: Path, listing: Sequence[str]) -> Record:
    """{cluster, submitted, steps} of a run: `steps` as its job says, None where it says epochs; raises Damaged.

    `listing` is what the run's folder holds.
    """
    path = run_dir / _BRIEF
    if _BRIEF not in listing:
        record = read_record(run_dir)
        return checked_record(_brief(record), run_dir / "job.yaml", BRIEF)
    return read_json(path, BRIEF)


def load_job(run_dir: Path) -> Job:
    """The frozen spec of a run that trains; raises Damaged."""
    job = load_any_job(run_dir)
    if isinstance(job, Job):
        return job
    path = run_dir / "job.yaml"
    kind = "a service" if isinstance(job, ServiceSpec) else "an evaluation"
    raise Damaged(f"{path}: found {kind}; allowed: a job that trains")


def load_any_job(run_dir: Path) -> AnyJob:
    """The frozen spec of a run; raises Damaged, also where another version of Fleetune wrote what this one lacks."""
    record = read_record(run_dir)
    path = run_dir / "job.yaml"
    return job_in(record, str(path))


def job_in(record: Mapping[str, Any], path: str) -> AnyJob:
    """The frozen spec in a record, which is that of the file `path`; raises Damaged."""
    try:
        return any_job(record["job"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        where = field or "job"
        raise Damaged(f"{path}: {where}: {first['msg']} (is it of another version?)") from None


def _as_yaml(record: Mapping[str, Any]) -> str:
    """A record as YAML that is read back as it is; letters of all scripts stand in it as they are."""
    text: str = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    if any(line_break in text for line_break in _LINE_BREAKS):
        text = yaml.safe_dump(record, sort_keys=False)
    return text


def _brief(record: Mapping[str, Any]) -> Record:
    train = record["job"].get("train")
    steps = None
    if isinstance(train, dict):
        steps = train.get("steps")
    cluster = record.get("cluster")
    submitted = record.get("submitted")
    return {"format": FORMAT, "cluster": cluster, "submitted": submitted, "steps": steps}
