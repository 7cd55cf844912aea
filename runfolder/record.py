"""RUN_DIR/job.yaml: what was submitted, frozen."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from runfolder.files import Damaged, Record
from runfolder.job import Job

# Reads ten times faster where libyaml is there.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_record(run_dir: Path) -> Record:
    """The whole file as plain data, `job` among it; raises Damaged."""
    path = run_dir / "job.yaml"
    try:
        record = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict) or not isinstance(record.get("job"), dict):
        raise Damaged(f"{path}: found no job in it")
    return record


def load_job(run_dir: Path) -> Job:
    """The frozen spec of a run; raises Damaged, also where another version of Fleetune wrote what this one lacks."""
    found = load_record(run_dir)["job"]
    try:
        return Job.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "job"
        raise Damaged(f"{run_dir / 'job.yaml'}: {where}: {first['msg']} (is it of another version?)") from None
